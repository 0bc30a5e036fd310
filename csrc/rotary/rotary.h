// Rotary positions and root-mean-square normalisation of heads, with their gradients. Derivations
// stand in gmkernels/ops/rotary/reference.py; the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace gm {

constexpr int64_t kRowGroup = 64;  // rows whose weight gradients are summed in float32

// [B, H, T, D] at any strides, in elements, but contiguous along D. data is null where absent.
struct HeadRows {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
  DType dtype = DType::f32;
};

struct HeadSizes {
  int64_t batches, heads, tokens, width;
  int64_t rows() const { return batches * heads * tokens; }
  int64_t groups() const { return (rows() + kRowGroup - 1) / kRowGroup; }
};

struct RotaryArgs {
  HeadRows x;
  HeadSizes sizes;
  Result y;                 // contiguous
  const float *cos, *sin;   // [places, half]
  int64_t half;             // pairs
  const int64_t* position;  // [1 or B, T], or null for 0, 1, ...
  int64_t position_stride;  // T, or 0 where all sequences share one row
  bool interleaved;
  bool inverse;  // turns back: sin with the other sign
};

struct RmsNormArgs {
  HeadRows x, dy;
  HeadSizes sizes;
  const float* weight;  // [D], or null: 1
  float eps;
  Result y, dx;              // contiguous; without data where not wanted
  float* dweight = nullptr;  // [groups, D]: sums over each group of rows, or null
};

struct RotaryTable {
  // Tokens [begin, end) of all batches: every head of each.
  void (*rotary_embedding)(const RotaryArgs& args, int64_t begin, int64_t end);
  // Rows [begin, end).
  void (*rms_norm)(const RmsNormArgs& args, int64_t begin, int64_t end);
  // Groups [begin, end) of rows.
  void (*rms_norm_backward)(const RmsNormArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(RotaryTable, rotary_table)

}  // namespace gm
