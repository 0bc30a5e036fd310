// One step of a diffusion sampler. Derivations stand in gmkernels/ops/diffusion_step/reference.py;
// the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"
#include "common/philox.h"

namespace gm {

constexpr int kStepColumns = 11;  // A B e f k m s x_direct p_direct low high

// The coefficients of a row stand at table[index[b * index_stride] * table_stride]; outside [0,
// table_rows) they are NaN.
struct StepTable {
  const float* table = nullptr;
  int64_t table_rows = 0, table_stride = 0;
  const int64_t* index = nullptr;
  int64_t index_stride = 0;
};

// One call on rows [B, D]. Absent operands have null data. noisy: eps is given, or made from the
// key folded by the row's index.
struct DiffusionStepArgs {
  Operand x, predicted, unconditional, previous, variance, eps;
  bool noisy = false;
  NoiseKey key;
  const int64_t* key_ptr = nullptr;  // CUDA: int64 [2] on the device, replaces key's seed, offset
  StepTable steps;
  float guidance = 1.0f;
  float clip;          // infinite: nothing is clamped
  double ratio = 0.0;  // > 0: dynamic thresholding
  float* h = nullptr;  // [B], the thresholds then
  int64_t rows, columns;
  // Forward. denoised is null where x0c is not wanted.
  Result x_next, denoised;
  // Backward; either gradient may be null.
  Operand dx_next, ddenoised;
  Result dx, dpredicted, dunconditional, dprevious, dvariance, deps;

  bool clips() const { return clip < __builtin_inff(); }
};

struct DiffusionStepTable {
  // Fills h for rows [begin, end).
  void (*threshold)(const DiffusionStepArgs& args, int64_t begin, int64_t end);
  void (*forward)(const DiffusionStepArgs& args, int64_t begin, int64_t end);
  void (*backward)(const DiffusionStepArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(DiffusionStepTable, diffusion_step_table)

// CUDA launchers; stream is a cudaStream_t. forward fills h too where ratio > 0.
void diffusion_step_cuda(const DiffusionStepArgs& args, void* stream);
void diffusion_step_backward_cuda(const DiffusionStepArgs& args, void* stream);

namespace GM_ISA {

// What a row's kernels multiply by, in the table's order.
struct StepCoefficients {
  float A, B, e, f, k, m, s, x_direct, p_direct, low, high;
};

GM_HD int64_t step_index(const StepTable& steps, int64_t row) {
  return steps.index[row * steps.index_stride];
}

GM_HD StepCoefficients read_step(const StepTable& steps, int64_t row) {
  const int64_t index = step_index(steps, row);
  const float nan = from_bits(0x7fc00000);
  if (index < 0 || index >= steps.table_rows) {
    return {nan, nan, nan, nan, nan, nan, nan, nan, nan, nan, nan};
  }
  const float* c = steps.table + index * steps.table_stride;
  return {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10]};
}

// p = u + g (c - u)
template <class F>
GM_HD F guided(F c, F u, float g) {
  return fma(splat<F>(g), c - u, u);
}

// x0 within [-h, h], over h with dynamic thresholding (by_h = 1 / h, else 1).
template <class F>
GM_HD F clamped(F x0, float h, float by_h) {
  return min_keeping_nan(max_keeping_nan(x0, -h), h) * by_h;
}

}  // namespace GM_ISA
}  // namespace gm
