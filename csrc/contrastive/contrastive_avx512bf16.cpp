// bfloat16 rows on a CPU that multiplies bfloat16: compiled for AVX512-BF16 alone.
#include "contrastive/stream.h"

namespace gm {
namespace GM_ISA {

extern const ContrastTable contrast_table = {prepare_tiles<Pairs>, forward_round<Pairs>,
                                             gradient_round<Pairs>, finish_tiles};

}  // namespace GM_ISA
}  // namespace gm
