// Losses over pairs of rows: the log-sum-exp over each row's negatives, and its gradient.
// Derivations stand in gmkernels/ops/contrastive/reference.py; the names are the same there and
// here.
#pragma once

#include <algorithm>

#include "common/heads.h"
#include "common/isa.h"

namespace gm {

// Own and other rows are cut into tiles of kTile, and each pair of tiles is visited once, for what
// both sides of it need. Round r visits own tile i with other tile (i + r) mod tiles, all i at
// once: no two visits of a round write to the same tile, and each tile is written to in an order
// that follows from the shape alone. A pair of rows (i, j) whose numbers differ by a multiple of
// `pairs` is no negative and is left out.
struct ContrastArgs {
  Heads own, other;  // [rows, D], of one dtype
  int64_t rows, width, pairs;
  bool symmetric;  // own and other are the same rows: half of the pairs of tiles is enough
  float scale;     // of the products
  // Forward: [rows] each, the second null where it is not wanted or the same as the first.
  float *lse_out = nullptr, *other_lse_out = nullptr;
  // Gradient: log-sum-exps and their gradients, [rows] each; both null where a side has none.
  const float *lse = nullptr, *dlse = nullptr;
  const float *other_lse = nullptr, *other_dlse = nullptr;
  // Of own and other, contiguous, in their dtype; null where not wanted.
  void *gradient = nullptr, *other_gradient = nullptr;

  // Memory on a cache line, filled by prepare(); what is null is not needed.
  float* turned = nullptr;                                 // own tiles [tiles, padded D, kTile]
  float *own_running = nullptr, *other_running = nullptr;  // kOwnRunning, kOtherRunning a row
  float *own_sums = nullptr, *other_sums = nullptr;  // gradients [rows, padded D], no scale yet

  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  int64_t tile_rows(int64_t tile) const { return std::min<int64_t>(kTile, rows - tile * kTile); }
  int64_t rounds() const { return symmetric ? tiles() / 2 + 1 : tiles(); }
  // The pairs of tiles that are half of all apart come in one order of the two only.
  int64_t visits(int64_t round) const {
    return symmetric && round > 0 && 2 * round == tiles() ? round : tiles();
  }
};

// Floats a row of maxima and sums so far: those of an own row and what softmax_block() leaves,
// those of each lane for another row.
constexpr int kOwnRunning = 3, kOtherRunning = 32;

struct ContrastTable {
  // Tasks are own tiles.
  void (*prepare)(const ContrastArgs& args, int64_t begin, int64_t end);
  void (*forward)(const ContrastArgs& args, int64_t round, int64_t begin, int64_t end);
  void (*gradient)(const ContrastArgs& args, int64_t round, int64_t begin, int64_t end);
  // After all rounds; tasks are tiles of either side.
  void (*finish)(const ContrastArgs& args, int64_t begin, int64_t end);
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
