#include <cassert>

#include "common/noise.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "diffusion_noise/diffusion_noise.h"

namespace gm {
namespace device {

// What a target is made of; none where there is no target.
enum class Reads { none, x0, eps, both };

// Blocks that a multiprocessor must hold: as many as go without spills. Unasked, ptxas spills in
// Any.
constexpr int kBlocks = 4;

template <Reads kReads>
static __device__ __forceinline__ float target_of(const RowLevels& level, float x0, float eps) {
  if constexpr (kReads == Reads::both) return mix(level.p, x0, level.q, eps);
  return kReads == Reads::x0 ? x0 : eps;
}

// a x + b y of those that are there.
template <bool kX, bool kY>
static __device__ __forceinline__ float mix_present(float a, float x, float b, float y) {
  if constexpr (kX && kY) return mix(a, x, b, y);
  return kX ? a * x : kY ? b * y : 0.0f;
}

// x_t and the target of a row chunk, by the lanes of a RowGrid.
template <class T, bool kDrawn, Reads kReads>
__global__ void __launch_bounds__(kThreads, kBlocks) add_noise_kernel(
    // x0 [B, D]; eps [B, D], or key or key_ptr where drawn; levels; x_t [B, D]; target [B, D]
    // unless kReads is none. T is the dtype of all.
    const __grid_constant__ DiffusionNoiseArgs a, const __grid_constant__ RowGrid grid) {
  constexpr int N = kWidth<T>;
  const NoiseKey key = kDrawn ? read_key(a.key, a.key_ptr) : NoiseKey{};
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    if (!columns) return;
    const int64_t start = chunk * kChunk;
    const RowLevels level = read_levels(a.levels, a.prediction, row);
    const RowIn<T> x0(a.x0, row, start), eps(a.eps, row, start);
    const RowOut<T> x_t(a.x_t, row, start), target(a.target, row, start);
    for_groups<N>(grid, lane, columns, [&](auto vector, int g, int count) {
      float x[N], e[N];
      x0.template load<vector>(g, count, x);
      if constexpr (!kDrawn) eps.template load<vector>(g, count, e);
      if constexpr (kDrawn) normals(key, row, start / 4 + g * (N / 4), e);
      float noised[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        noised[i] = mix(level.a, x[i], level.s, e[i]);
        e[i] = target_of<kReads>(level, x[i], e[i]);
      }
      x_t.template store<vector>(g, count, noised);
      if constexpr (kReads != Reads::none) target.template store<vector>(g, count, e);
    });
  });
}

// Gradients of the noising, by the lanes of a RowGrid. kNoised: x_t has one.
template <class T, bool kNoised, Reads kReads>
__global__ void __launch_bounds__(kThreads, kBlocks) add_noise_backward_kernel(
    // dx_t [B, D] where kNoised; dtarget [B, D] unless kReads is none; levels; dx0, deps [B, D] or
    // null, each. T is the dtype of all.
    const __grid_constant__ DiffusionNoiseArgs a, const __grid_constant__ RowGrid grid) {
  constexpr int N = kWidth<T>;
  constexpr bool kX0 = kReads == Reads::x0 || kReads == Reads::both;
  constexpr bool kEps = kReads == Reads::eps || kReads == Reads::both;
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    if (!columns) return;
    const int64_t start = chunk * kChunk;
    const RowLevels level = read_levels(a.levels, a.prediction, row);
    const RowIn<T> dx_t(a.dx_t, row, start), dtarget(a.dtarget, row, start);
    const RowOut<T> dx0(a.dx0, row, start), deps(a.deps, row, start);
    for_groups<N>(grid, lane, columns, [&](auto vector, int g, int count) {
      float by_x_t[N] = {}, by_target[N] = {}, out[N];
      if constexpr (kNoised) dx_t.template load<vector>(g, count, by_x_t);
      if constexpr (kX0 || kEps) dtarget.template load<vector>(g, count, by_target);
      if (a.dx0.data) {
#pragma unroll
        for (int i = 0; i < N; ++i)
          out[i] = mix_present<kNoised, kX0>(level.a, by_x_t[i], level.p, by_target[i]);
        dx0.template store<vector>(g, count, out);
      }
      if (a.deps.data) {
#pragma unroll
        for (int i = 0; i < N; ++i)
          out[i] = mix_present<kNoised, kEps>(level.s, by_x_t[i], level.q, by_target[i]);
        deps.template store<vector>(g, count, out);
      }
    });
  });
}

// The loss of a row chunk, and its residual, by the lanes of a RowGrid.
template <class T, bool kDrawn, Reads kReads>
__global__ void __launch_bounds__(kThreads, kBlocks) denoising_loss_kernel(
    // predicted [B, D]; x0 [B, D] unless kReads is eps; eps [B, D] where given, key or key_ptr
    // where drawn, unless kReads is x0; levels; residual [B, D] or null; partial [B, chunks],
    // written where chunks is over 1; loss [B], written where it is 1. T is the dtype of all but
    // loss and partial.
    const __grid_constant__ DiffusionNoiseArgs a, const __grid_constant__ RowGrid grid) {
  constexpr int N = kWidth<T>;
  constexpr bool kX0 = kReads != Reads::eps, kGiven = kReads != Reads::x0 && !kDrawn;
  const NoiseKey key = kDrawn ? read_key(a.key, a.key_ptr) : NoiseKey{};
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    const int64_t start = chunk * kChunk;
    const RowLevels level = row < 0 ? RowLevels{} : read_levels(a.levels, a.prediction, row);
    const RowIn<T> predicted(a.predicted, row, start), x0(a.x0, row, start), eps(a.eps, row, start);
    const RowOut<T> residual(a.residual, row, start);
    float sum = 0.0f;
    for_groups<N>(grid, lane, columns, [&](auto vector, int g, int count) {
      float r[N], x[N] = {}, e[N] = {}, square[N];
      predicted.template load<vector>(g, count, r);
      if constexpr (kX0) x0.template load<vector>(g, count, x);
      if constexpr (kGiven) eps.template load<vector>(g, count, e);
      if constexpr (kDrawn) normals(key, row, start / 4 + g * (N / 4), e);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        r[i] -= target_of<kReads>(level, x[i], e[i]);
        square[i] = i < count ? r[i] * r[i] : 0.0f;
      }
      sum += group_sum(square);
      if (a.residual.data) residual.template store<vector>(g, count, r);
    });
    sum = row_sum(sum, grid);
    if (lane != 0 || row < 0) return;
    if (grid.chunks > 1) {
      a.partial[row * grid.chunks + chunk] = sum;
    } else {
      a.loss[row] = level.w * (sum / (float)a.columns);
    }
  });
}

// loss of rows that have several chunks: a warp a row, in a fixed order.
__global__ void __launch_bounds__(kThreads) denoising_loss_sum_kernel(
    // partial [B, chunks], levels; loss [B]. The grid's columns are the chunks.
    const __grid_constant__ DiffusionNoiseArgs a, const __grid_constant__ RowGrid grid) {
  for_row_chunks(grid, [&](int64_t row, int64_t, int columns, int lane) {
    double sum = 0.0;
    if (columns) {
      for (int64_t i = lane; i < grid.columns; i += 32) sum += a.partial[row * grid.columns + i];
    }
    sum = row_sum(sum, grid);
    if (lane != 0 || row < 0) return;
    const RowLevels level = read_levels(a.levels, a.prediction, row);
    a.loss[row] = (float)(level.w * (sum / (double)a.columns));
  });
}

// Gradients of the loss, by the lanes of a RowGrid; 0 for what the target does not read.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) denoising_loss_backward_kernel(
    // dloss [B], any dtype; kept [B, D]; levels; dpredicted, dx0, deps [B, D] or null, each. T is
    // the dtype of all but dloss.
    const __grid_constant__ DiffusionNoiseArgs a, const __grid_constant__ RowGrid grid) {
  constexpr int N = kWidth<T>;
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    if (!columns) return;
    const int64_t start = chunk * kChunk;
    const RowLevels level = read_levels(a.levels, a.prediction, row);
    const float dloss = read_value(a.dloss, row * a.dloss.row_stride);
    const float c = 2.0f * level.w * dloss / (float)a.columns;
    const RowIn<T> kept(a.kept, row, start);
    const RowOut<T> dpredicted(a.dpredicted, row, start);
    const RowOut<T> dx0(a.dx0, row, start), deps(a.deps, row, start);
    for_groups<N>(grid, lane, columns, [&](auto vector, int g, int count) {
      float r[N];
      kept.template load<vector>(g, count, r);
      const auto write = [&](const RowOut<T>& to, bool reads, float scale) {
        float out[N];
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = reads ? scale * r[i] : 0.0f;
        to.template store<decltype(vector)::value>(g, count, out);
      };
      if (a.dpredicted.data) write(dpredicted, true, c);
      if (a.dx0.data) write(dx0, reads_x0(a.prediction), -level.p * c);
      if (a.deps.data) write(deps, reads_eps(a.prediction), -level.q * c);
    });
  });
}

// Calls body with what the targets of a prediction type read, as a constant.
template <class Body>
static void with_reads(Prediction prediction, Body body) {
  if (!reads_x0(prediction)) return body(std::integral_constant<Reads, Reads::eps>{});
  if (!reads_eps(prediction)) return body(std::integral_constant<Reads, Reads::x0>{});
  body(std::integral_constant<Reads, Reads::both>{});
}

template <class T, Reads kReads>
static void launch_add_noise(const DiffusionNoiseArgs& a, const RowGrid& grid, void* stream) {
  const char* op = kReads == Reads::none ? "add_noise" : "add_noise_with_target";
  const auto kernel =
      a.eps.data ? &add_noise_kernel<T, false, kReads> : &add_noise_kernel<T, true, kReads>;
  launch_rows(op, kernel, grid, stream, a);
}

template <class T, Reads kReads>
static void launch_add_noise_backward(const DiffusionNoiseArgs& a, const RowGrid& grid,
                                      void* stream) {
  const char* op = kReads == Reads::none ? "add_noise_backward" : "add_noise_with_target_backward";
  const auto kernel = a.dx_t.data ? &add_noise_backward_kernel<T, true, kReads>
                                  : &add_noise_backward_kernel<T, false, kReads>;
  launch_rows(op, kernel, grid, stream, a);
}

template <class T, Reads kReads>
static void launch_loss(const DiffusionNoiseArgs& a, const RowGrid& grid, void* stream) {
  assert(grid.chunks == 1 || a.partial);
  constexpr bool kDraws = kReads != Reads::x0;  // where eps is absent
  const auto kernel = a.eps.data ? &denoising_loss_kernel<T, false, kReads>
                                 : &denoising_loss_kernel<T, kDraws, kReads>;
  launch_rows("denoising_loss", kernel, grid, stream, a);
  if (grid.chunks > 1) {
    const RowGrid warps{a.rows, grid.chunks, 1, 5, false};
    launch_rows("denoising_loss", &denoising_loss_sum_kernel, warps, stream, a);
  }
}

}  // namespace device

void diffusion_noise_cuda(const DiffusionNoiseArgs& a, void* stream) {
  device::with_dtype(a.rows, a.columns, {a.x0, a.eps, a.x_t, a.target},
                     [&](auto type, const device::RowGrid& grid) {
                       using T = decltype(type);
                       if (!a.target.data) {
                         return device::launch_add_noise<T, device::Reads::none>(a, grid, stream);
                       }
                       device::with_reads(a.prediction, [&](auto reads) {
                         device::launch_add_noise<T, reads>(a, grid, stream);
                       });
                     });
}

void diffusion_noise_backward_cuda(const DiffusionNoiseArgs& a, void* stream) {
  const Operand& first = a.dx_t.data ? a.dx_t : a.dtarget;  // absent, its dtype says nothing
  device::with_dtype(a.rows, a.columns, {first, a.dtarget, a.dx0, a.deps},
                     [&](auto type, const device::RowGrid& grid) {
                       using T = decltype(type);
                       if (!a.dtarget.data) {
                         return device::launch_add_noise_backward<T, device::Reads::none>(a, grid,
                                                                                          stream);
                       }
                       device::with_reads(a.prediction, [&](auto reads) {
                         device::launch_add_noise_backward<T, reads>(a, grid, stream);
                       });
                     });
}

void denoising_loss_cuda(const DiffusionNoiseArgs& a, void* stream) {
  const Operand x0 = device::reads_x0(a.prediction) ? a.x0 : Operand{};
  const Operand eps = device::reads_eps(a.prediction) ? a.eps : Operand{};
  device::with_dtype(a.rows, a.columns, {a.predicted, x0, eps, a.residual},
                     [&](auto type, const device::RowGrid& grid) {
                       device::with_reads(a.prediction, [&](auto reads) {
                         device::launch_loss<decltype(type), reads>(a, grid, stream);
                       });
                     });
}

void denoising_loss_backward_cuda(const DiffusionNoiseArgs& a, void* stream) {
  device::with_dtype(a.rows, a.columns, {a.kept, a.dpredicted, a.dx0, a.deps},
                     [&](auto type, const device::RowGrid& grid) {
                       launch_rows("denoising_loss_backward",
                                   &device::denoising_loss_backward_kernel<decltype(type)>, grid,
                                   stream, a);
                     });
}

}  // namespace gm
