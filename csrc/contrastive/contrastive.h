// Losses over pairs of rows: the log-sum-exp over each row's negatives, and its gradient.
// Derivations stand in gmkernels/ops/contrastive/reference.py; the names are the same there and
// here.
#pragma once

#include "common/heads.h"
#include "common/isa.h"

namespace gm {

// One pass: own rows i in tiles of kTile, past which all other rows j stream. A pair (i, j) whose
// numbers differ by a multiple of `pairs` is no negative of its row and is left out.
struct ContrastArgs {
  Heads own, other;  // [rows, D], of one dtype
  int64_t rows, width, pairs;
  float scale;               // of the products
  float* lse_out = nullptr;  // forward: [rows]
  // Gradient: log-sum-exps and their gradients, [rows] each; both null where a side has none.
  const float *lse = nullptr, *dlse = nullptr;
  const float *other_lse = nullptr, *other_dlse = nullptr;
  void* gradient = nullptr;  // of own, contiguous, in its dtype

  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
};

// Tasks of both are tiles of own rows.
struct ContrastTable {
  void (*forward)(const ContrastArgs& args, int64_t begin, int64_t end);
  void (*gradient)(const ContrastArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(ContrastTable, contrast_table)

#if defined(GM_X86)
namespace v4_bf16 {
extern const ContrastTable contrast_table;
}
#endif

// bfloat16 rows have kernels of their own where the CPU multiplies bfloat16.
inline const ContrastTable& select_contrast(DType dtype) {
#if defined(GM_X86)
  if (dtype == DType::bf16 && active_isa.load(std::memory_order_relaxed) == Isa::v4_bf16)
    return v4_bf16::contrast_table;
#endif
  return select_contrast_table();
}

}  // namespace gm
