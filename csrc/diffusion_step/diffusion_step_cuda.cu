#include "common/noise.cuh"
#include "common/rows.cuh"
#include "diffusion_step/diffusion_step.h"
#include "diffusion_step/threshold.cuh"

namespace gm {
namespace device {

// Where n comes from; none where the step adds no noise.
enum class Noise { none, given, drawn };

// Blocks that a multiprocessor must hold: as many as go without spills.
template <class T, bool kClip, Noise kNoise>
constexpr int kForwardBlocks = kNoise == Noise::none                                 ? 4
                               : kNoise == Noise::drawn && (kClip || kWidth<T> == 4) ? 2
                                                                                     : 3;
template <class T, bool kClip, bool kDrawn>
constexpr int kBackwardBlocks = !kClip                             ? 3
                                : kDrawn && std::is_same_v<T, Any> ? 1
                                                                   : 2;

// The key of a row's noise.
static __device__ __forceinline__ NoiseKey row_key(const DiffusionStepArgs& a, int64_t row) {
  return fold_key(read_key(a.key, a.key_ptr), step_index(a.steps, row));
}

// What s is multiplied by where the variance v is learned.
static __device__ __forceinline__ float scale_of(const StepCoefficients& step, float v) {
  return exp(fma(v + 1.0f, 0.5f * (step.high - step.low), step.low));
}

// Group g of an operand that may be absent: then it reads as 0.
template <bool kVector, class T, int N>
static __device__ __forceinline__ void load_or_zero(const Operand& x, const RowIn<T>& row, int g,
                                                    int count, float (&out)[N]) {
  if (x.data) return row.template load<kVector>(g, count, out);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = 0.0f;
}

// x' and x0c of a chunk of a row by this thread's groups; x0 within [-h, h], over h by by_h, where
// kClip.
template <class T, bool kClip, Noise kNoise>
static __device__ __forceinline__ void step_chunk(const DiffusionStepArgs& a, const RowGrid& grid,
                                                  const StepCoefficients& step, const NoiseKey& key,
                                                  int64_t row, int64_t chunk, int columns, int lane,
                                                  float h, float by_h) {
  constexpr int N = kWidth<T>;
  const int64_t start = chunk * kChunk;
  const float m = a.previous.data ? step.m : 0.0f;
  const RowIn<T> x(a.x, row, start), c(a.predicted, row, start), u(a.unconditional, row, start);
  const RowIn<T> previous(a.previous, row, start), variance(a.variance, row, start);
  const RowIn<T> eps(a.eps, row, start);
  const RowOut<T> x_next(a.x_next, row, start), denoised(a.denoised, row, start);
  for_groups<N>(grid, lane, columns, [&](auto vector, int g, int count) {
    float y[N], p[N], other[N];
    x.template load<vector>(g, count, y);
    load_guided<vector>(a, c, u, g, count, p);
    load_or_zero<vector>(a.previous, previous, g, count, other);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float x0 = mix(step.A, y[i], step.B, p[i]);
      if constexpr (kClip) {
        x0 = clamped(x0, h, by_h);
        y[i] = fma(step.k, p[i], mix(step.e, y[i], step.f, x0));
      } else {
        y[i] = mix(step.x_direct, y[i], step.p_direct, p[i]);
      }
      p[i] = x0;
      y[i] = fma(m, other[i], y[i]);
    }
    if (a.denoised.data) denoised.template store<vector>(g, count, p);
    if constexpr (kNoise != Noise::none) {
      if constexpr (kNoise == Noise::given) eps.template load<vector>(g, count, p);
      if constexpr (kNoise == Noise::drawn) normals(key, row, start / 4 + g * (N / 4), p);
      if (a.variance.data) {
        variance.template load<vector>(g, count, other);
#pragma unroll
        for (int i = 0; i < N; ++i) p[i] *= scale_of(step, other[i]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = fma(step.s, p[i], y[i]);
    }
    x_next.template store<vector>(g, count, y);
  });
}

// x' and x0c of a row chunk, by the lanes of a RowGrid, with a fixed range of x0 or none.
template <class T, bool kClip, Noise kNoise>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, kClip, kNoise>) diffusion_step_kernel(
    // x, predicted [B, D]; unconditional, previous, variance [B, D] or null, each; eps [B, D] where
    // given; key or key_ptr where drawn; steps; x_next [B, D]; denoised [B, D] or null. T is the
    // dtype of all.
    const __grid_constant__ DiffusionStepArgs a, const __grid_constant__ RowGrid grid) {
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    if (!columns) return;
    const StepCoefficients step = read_step(a.steps, row);
    const NoiseKey key = kNoise == Noise::drawn ? row_key(a, row) : NoiseKey{};
    step_chunk<T, kClip, kNoise>(a, grid, step, key, row, chunk, columns, lane, a.clip, 1.0f);
  });
}

// h, x' and x0c of a row, a block each, with dynamic thresholding: three passes over the row find
// h, the fourth makes the step.
template <class T, Noise kNoise>
__global__ void __launch_bounds__(kSelectThreads, 1) dynamic_step_kernel(
    // As diffusion_step_kernel's, and h [B], which is written; D below 2^32.
    const __grid_constant__ DiffusionStepArgs a, const __grid_constant__ RowGrid grid) {
  for (int64_t row = blockIdx.x; row < grid.rows; row += gridDim.x) {
    const StepCoefficients step = read_step(a.steps, row);
    const float h = find_threshold<T>(a, grid, step, row);
    if (threadIdx.x == 0) a.h[row] = h;
    const NoiseKey key = kNoise == Noise::drawn ? row_key(a, row) : NoiseKey{};
    for (int64_t chunk = 0; chunk < grid.chunks; ++chunk) {
      const int columns = (int)min(grid.columns - chunk * kChunk, kChunk);
      step_chunk<T, true, kNoise>(a, grid, step, key, row, chunk, columns, threadIdx.x, h,
                                  1.0f / h);
    }
  }
}

// Gradients of a row chunk, by the lanes of a RowGrid. kDrawn: dvariance takes n from the key.
template <class T, bool kClip, bool kDrawn>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, kClip, kDrawn>)
    diffusion_step_backward_kernel(
        // dx_next, ddenoised, variance, eps [B, D] or null, each; x, predicted [B, D],
        // unconditional [B, D] or null, read where kClip; h [B] where kClip and ratio > 0; key or
        // key_ptr where kDrawn; steps; dx, dpredicted, dunconditional, dprevious, dvariance, deps
        // [B, D] or null, each. T is the dtype of all but h.
        const __grid_constant__ DiffusionStepArgs a, const __grid_constant__ RowGrid grid) {
  constexpr int N = kWidth<T>;
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    if (!columns) return;
    const int64_t start = chunk * kChunk;
    const StepCoefficients step = read_step(a.steps, row);
    const bool dynamic = kClip && a.ratio > 0;
    const float h = dynamic ? a.h[row] : a.clip, by_h = dynamic ? 1.0f / h : 1.0f;
    const NoiseKey key = kDrawn ? row_key(a, row) : NoiseKey{};
    // A coefficient may be infinite where its gradient is absent.
    const bool has_x = a.dx_next.data, has_x0 = a.ddenoised.data || kClip;
    const float by_x = has_x ? kClip ? step.e : step.x_direct : 0.0f, A = has_x0 ? step.A : 0.0f;
    const float by_p = has_x ? kClip ? step.k : step.p_direct : 0.0f, B = has_x0 ? step.B : 0.0f;
    const float f = has_x ? step.f : 0.0f, guidance = a.unconditional.data ? a.guidance : 1.0f;
    const RowIn<T> dx_next(a.dx_next, row, start), ddenoised(a.ddenoised, row, start);
    const RowIn<T> x(a.x, row, start), c(a.predicted, row, start), u(a.unconditional, row, start);
    const RowIn<T> variance(a.variance, row, start), eps(a.eps, row, start);
    const RowOut<T> dx(a.dx, row, start), dpredicted(a.dpredicted, row, start);
    const RowOut<T> dunconditional(a.dunconditional, row, start);
    const RowOut<T> dprevious(a.dprevious, row, start), deps(a.deps, row, start);
    const RowOut<T> dvariance(a.dvariance, row, start);
    for_groups<N>(grid, lane, columns, [&](auto vector, int g, int count) {
      float d[N], dx0[N], out[N];
      load_or_zero<vector>(a.dx_next, dx_next, g, count, d);
      load_or_zero<vector>(a.ddenoised, ddenoised, g, count, dx0);
      if constexpr (kClip) {
        float p[N];
        x.template load<vector>(g, count, out);
        load_guided<vector>(a, c, u, g, count, p);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const bool outside = fabsf(mix(step.A, out[i], step.B, p[i])) > h;
          dx0[i] = (outside ? 0.0f : fma(f, d[i], dx0[i])) * by_h;
        }
      }
      const auto write = [&](const Result& y, const RowOut<T>& to, auto value) {
        if (!y.data) return;
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = value(i);
        to.template store<decltype(vector)::value>(g, count, out);
      };
      const auto dp = [&](int i) { return mix(by_p, d[i], B, dx0[i]); };
      write(a.dx, dx, [&](int i) { return mix(by_x, d[i], A, dx0[i]); });
      write(a.dpredicted, dpredicted, [&](int i) { return guidance * dp(i); });
      write(a.dunconditional, dunconditional, [&](int i) { return (1.0f - guidance) * dp(i); });
      write(a.dprevious, dprevious, [&](int i) { return step.m * d[i]; });
      if (!a.dvariance.data && !a.deps.data) return;
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] *= step.s;
      if (a.variance.data) {
        variance.template load<vector>(g, count, out);
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] *= scale_of(step, out[i]);
      }
      write(a.deps, deps, [&](int i) { return d[i]; });
      if (!a.dvariance.data) return;
      if constexpr (kDrawn) {
        normals(key, row, start / 4 + g * (N / 4), out);
      } else {
        load_or_zero<vector>(a.eps, eps, g, count, out);
      }
      const float slope = 0.5f * (step.high - step.low);
      write(a.dvariance, dvariance, [&](int i) { return d[i] * out[i] * slope; });
    });
  });
}

// kernel on blocks of kSelectThreads, one a row.
template <class Kernel>
static void launch_a_block_a_row(Kernel kernel, const DiffusionStepArgs& a, RowGrid grid,
                                 void* stream) {
  if (a.rows == 0) return;
  grid.log2_lanes = kSelectLog2;
  const unsigned blocks = a.rows < 65535 ? (unsigned)a.rows : 65535;
  kernel<<<blocks, kSelectThreads, 0, (cudaStream_t)stream>>>(a, grid);
  check_cuda("sampler_step", cudaGetLastError());
}

}  // namespace device

void diffusion_step_cuda(const DiffusionStepArgs& a, void* stream) {
  using device::Noise;
  const auto launch = [&](auto type, auto noise, const device::RowGrid& grid) {
    using T = decltype(type);
    constexpr Noise kNoise = decltype(noise)::value;
    if (a.ratio > 0) {
      return device::launch_a_block_a_row(&device::dynamic_step_kernel<T, kNoise>, a, grid, stream);
    }
    const auto kernel = a.clips() ? &device::diffusion_step_kernel<T, true, kNoise>
                                  : &device::diffusion_step_kernel<T, false, kNoise>;
    device::launch_rows("sampler_step", kernel, grid, stream, a);
  };
  device::with_dtype(
      a.rows, a.columns,
      {a.x, a.predicted, a.unconditional, a.previous, a.variance, a.eps, a.x_next, a.denoised},
      [&](auto type, const device::RowGrid& grid) {
        if (!a.noisy) return launch(type, std::integral_constant<Noise, Noise::none>{}, grid);
        if (a.eps.data) return launch(type, std::integral_constant<Noise, Noise::given>{}, grid);
        launch(type, std::integral_constant<Noise, Noise::drawn>{}, grid);
      });
}

void diffusion_step_backward_cuda(const DiffusionStepArgs& a, void* stream) {
  // Operands that are not read have no say in the dtype.
  const bool clips = a.clips() && (a.dx.data || a.dpredicted.data || a.dunconditional.data);
  const bool noise = a.dvariance.data || a.deps.data;
  const bool draws = a.dvariance.data && a.dx_next.data && a.noisy && !a.eps.data;
  const auto read = [](const Operand& x, bool reads) { return reads ? x : Operand{}; };
  const Operand& first = a.dx_next.data ? a.dx_next : a.ddenoised;
  const auto launch = [&](auto type, auto clip, const device::RowGrid& grid) {
    using T = decltype(type);
    const auto kernel = draws ? &device::diffusion_step_backward_kernel<T, clip, true>
                              : &device::diffusion_step_backward_kernel<T, clip, false>;
    device::launch_rows("sampler_step_backward", kernel, grid, stream, a);
  };
  device::with_dtype(
      a.rows, a.columns,
      {first, a.ddenoised, read(a.x, clips), read(a.predicted, clips), read(a.unconditional, clips),
       read(a.variance, noise), read(a.eps, a.dvariance.data), a.dx, a.dpredicted, a.dunconditional,
       a.dprevious, a.dvariance, a.deps},
      [&](auto type, const device::RowGrid& grid) {
        if (clips) return launch(type, std::true_type{}, grid);
        launch(type, std::false_type{}, grid);
      });
}

}  // namespace gm
