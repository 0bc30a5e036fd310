// bfloat16 heads on a CPU that multiplies bfloat16: compiled for AVX512-BF16 alone.
#include "attention/backward.h"

namespace gm {
namespace GM_ISA {

extern const AttentionTable attention_table = {forward_tasks<Pairs>, backward_tasks<Pairs>,
                                               sum_parts};

}  // namespace GM_ISA
}  // namespace gm
