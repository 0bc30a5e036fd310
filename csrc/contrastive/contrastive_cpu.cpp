#include "contrastive/stream.h"

namespace gm {
namespace GM_ISA {

extern const ContrastTable contrast_table = {prepare_tiles<Single>, forward_round<Single>,
                                             gradient_round<Single>, finish_tiles};

}  // namespace GM_ISA
}  // namespace gm
