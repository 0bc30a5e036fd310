#include "contrastive/stream.h"

namespace gm {
namespace GM_ISA {

extern const ContrastTable contrast_table = {forward_tiles<Single>, gradient_tiles<Single>};

}  // namespace GM_ISA
}  // namespace gm
