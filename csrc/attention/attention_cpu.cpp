#include "attention/backward.h"

namespace gm {
namespace GM_ISA {

extern const AttentionTable attention_table = {forward_tasks<Single>, backward_tasks<Single>,
                                               sum_parts};

}  // namespace GM_ISA
}  // namespace gm
