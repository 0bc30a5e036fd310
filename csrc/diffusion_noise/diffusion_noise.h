// Noising of data, denoising targets and their loss. Derivations stand in
// gmkernels/ops/diffusion_noise/reference.py; the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"

namespace gm {

enum class Prediction : int32_t { epsilon, sample, v_prediction, flow_prediction };

// Levels of each row: (a, s, w) at table[index * table_stride + 0, 1, 2], index = t[b * t_stride],
// or b where t is null. Outside [0, table_rows) they are NaN.
struct Levels {
  const float* table = nullptr;
  int64_t table_rows = 0, table_stride = 0;
  const int64_t* t = nullptr;
  int64_t t_stride = 0;
};

// One call on rows [B, D]. An absent eps is made from the key.
struct DiffusionNoiseArgs {
  Operand x0, eps, predicted;
  NoiseKey key;
  const int64_t* key_ptr = nullptr;  // CUDA: int64 [2] on the device, replaces key's seed, offset
  Levels levels;
  Prediction prediction = Prediction::epsilon;
  int64_t rows, columns;
  // Noising: x_t, and target unless null.
  Result x_t, target;
  // Loss.
  Result residual;           // null where it is not kept
  float* loss = nullptr;     // [B]; written by CUDA, on the CPU from the sums
  float* partial = nullptr;  // CUDA: [B, chunks] scratch where a row has more than one chunk
  // Backward of the noising: dx_t and dtarget (either may be null); of the loss: dloss [B], stride
  // 0, and the kept residual.
  Operand dx_t, dtarget, dloss, kept;
  Result dpredicted, dx0, deps;
};

struct DiffusionNoiseTable {
  void (*noise)(const DiffusionNoiseArgs& args, int64_t begin, int64_t end);
  void (*noise_backward)(const DiffusionNoiseArgs& args, int64_t begin, int64_t end);
  // sums [tasks]: sum of r^2 of each chunk.
  void (*loss)(const DiffusionNoiseArgs& args, double* sums, int64_t begin, int64_t end);
  void (*loss_backward)(const DiffusionNoiseArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(DiffusionNoiseTable, diffusion_noise_table)

// CUDA launchers; stream is a cudaStream_t.
void diffusion_noise_cuda(const DiffusionNoiseArgs& args, void* stream);
void diffusion_noise_backward_cuda(const DiffusionNoiseArgs& args, void* stream);
void denoising_loss_cuda(const DiffusionNoiseArgs& args, void* stream);
void denoising_loss_backward_cuda(const DiffusionNoiseArgs& args, void* stream);

namespace GM_ISA {

// What a row's kernels multiply by.
struct RowLevels {
  float a, s, w, p, q;
};

GM_HD RowLevels read_levels(const Levels& levels, Prediction prediction, int64_t row) {
  const int64_t index = levels.t ? levels.t[row * levels.t_stride] : row;
  RowLevels x;
  x.a = x.s = x.w = from_bits(0x7fc00000);
  if (index >= 0 && index < levels.table_rows) {
    const float* at = levels.table + index * levels.table_stride;
    x.a = at[0], x.s = at[1], x.w = at[2];
  }
  const bool v = prediction == Prediction::v_prediction;
  const bool flow = prediction == Prediction::flow_prediction;
  x.p = v ? -x.s : flow ? -1.0f : prediction == Prediction::sample ? 1.0f : 0.0f;
  x.q = v ? x.a : prediction == Prediction::sample ? 0.0f : 1.0f;
  return x;
}

// Which of x0 and eps a target is made of.
GM_HD bool reads_x0(Prediction prediction) { return prediction != Prediction::epsilon; }
GM_HD bool reads_eps(Prediction prediction) { return prediction != Prediction::sample; }

}  // namespace GM_ISA
}  // namespace gm
