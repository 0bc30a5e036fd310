#include "common/noise.cuh"
#include "common/rows.cuh"
#include "diffusion_step/diffusion_step.h"

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

constexpr int kSelectLog2 = 10, kSelectThreads = 1 << kSelectLog2;  // a block of threshold_kernel
constexpr int kDigit = 11, kBins = 1 << kDigit;  // bits a pass; two bins a thread

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

// p of group g.
template <bool kVector, class T, int N>
static __device__ __forceinline__ void load_guided(const DiffusionStepArgs& a, const RowIn<T>& c,
                                                   const RowIn<T>& u, int g, int count,
                                                   float (&p)[N]) {
  c.template load<kVector>(g, count, p);
  if (!a.unconditional.data) return;
  float v[N];
  u.template load<kVector>(g, count, v);
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = guided(p[i], v[i], a.guidance);
}

// Runs body on the bits of |x0| of this thread's columns of a row; they are ordered as the numbers
// are, NaN last.
template <class T, class Body>
static __device__ __forceinline__ void for_magnitudes(const DiffusionStepArgs& a,
                                                      const RowGrid& grid,
                                                      const StepCoefficients& step, int64_t row,
                                                      Body body) {
  constexpr int N = kWidth<T>;
  for (int64_t start = 0; start < grid.columns; start += kChunk) {
    const int columns = (int)min(grid.columns - start, kChunk);
    const RowIn<T> x(a.x, row, start), c(a.predicted, row, start), u(a.unconditional, row, start);
    for_groups<N>(grid, threadIdx.x, columns, [&](auto vector, int g, int count) {
      float x0[N], p[N];
      x.template load<vector>(g, count, x0);
      load_guided<vector>(a, c, u, g, count, p);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < count) body((uint32_t)bits(mix(step.A, x0[i], step.B, p[i])) & 0x7fffffffu);
    });
  }
}

// A value's bin, the values in that bin, and how many of those come before it.
struct Found {
  uint32_t bin, count, rank;
};

// Where the value of a rank lies in a histogram; every thread of the block calls this together, and
// rank is below the histogram's sum.
static __device__ __forceinline__ Found find_rank(const uint32_t* histogram, uint32_t rank) {
  __shared__ uint32_t warps[kSelectThreads / 32];
  __shared__ Found found;
  const uint32_t bin = 2 * threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t first = histogram[bin], second = histogram[bin + 1];
  uint32_t sum = first + second;
#pragma unroll
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  for (uint32_t i = 0; i < warp; ++i) sum += warps[i];
  const uint32_t before = sum - first - second, middle = before + first;
  if (before <= rank && rank < middle) found = {bin, first, rank - before};
  if (middle <= rank && rank < sum) found = {bin + 1, second, rank - middle};
  __syncthreads();
  return found;
}

// The quantile between two order statistics, as torch.lerp rounds it, within [1, clip].
static __device__ __forceinline__ float threshold_of(float below, float above, float weight,
                                                     float clip) {
  const float gap = above - below;
  const float x = weight < 0.5f ? below + weight * gap : above - gap * (1.0f - weight);
  return min_keeping_nan(max_keeping_nan(x, 1.0f), clip);
}

// h of a row, a block each: radix select over the bits of |x0|, 11 in each of two passes, 9 in the
// last. Integer atomics alone, whose order does not matter.
template <class T>
__global__ void __launch_bounds__(kSelectThreads) threshold_kernel(
    // x, predicted [B, D], D below 2^32; unconditional [B, D] or null; steps; h [B]. T is the dtype
    // of the first three.
    const __grid_constant__ DiffusionStepArgs a, const __grid_constant__ RowGrid grid) {
  __shared__ uint32_t histogram[kBins], next;
  const double place = grid.columns ? a.ratio * (double)(grid.columns - 1) : 0.0;
  const float weight = (float)(place - (double)(uint32_t)place);
  for (int64_t row = blockIdx.x; row < grid.rows; row += gridDim.x) {
    const StepCoefficients step = read_step(a.steps, row);
    Found found = {0, 0, (uint32_t)place};
    uint32_t below = 0, above = ~0u;  // bits of the two order statistics
    bool bad = false;
    if (threadIdx.x == 0) next = ~0u;
    for (int pass = 0; pass < 3 && !bad && grid.columns; ++pass) {
      // Bin i counts the values from below + i 2^shift on; above is the least one past the bins.
      const int shift = max(20 - kDigit * pass, 0);
      histogram[threadIdx.x] = histogram[threadIdx.x + kSelectThreads] = 0;
      above = ~0u;
      __syncthreads();
      for_magnitudes<T>(a, grid, step, row, [&](uint32_t value) {
        const uint32_t bin = (value - below) >> shift;
        bad |= value > 0x7f800000u;
        if (bin < (uint32_t)kBins) {
          atomicAdd(&histogram[bin], 1u);
        } else if (value > below) {
          above = min(above, value);
        }
      });
      bad = __syncthreads_or(bad);
      if (!bad) found = find_rank(histogram, found.rank);
      below += found.bin << shift;
    }
    if (bad || grid.columns == 0) {
      if (threadIdx.x == 0) a.h[row] = bad ? from_bits(0x7fc00000) : 1.0f;
      continue;
    }
    for (uint32_t bin = threadIdx.x; bin < (uint32_t)kBins; bin += kSelectThreads)
      if (bin > found.bin && histogram[bin]) above = min(above, below + (bin - found.bin));
    atomicMin(&next, above);
    __syncthreads();
    if (threadIdx.x) continue;
    // The last of all has no other above it.
    above = found.rank + 1 < found.count || next == ~0u ? below : next;
    a.h[row] = threshold_of(from_bits(below), from_bits(above), weight, a.clip);
  }
}

// x' and x0c of a row chunk, by the lanes of a RowGrid.
template <class T, bool kClip, Noise kNoise>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, kClip, kNoise>) diffusion_step_kernel(
    // x, predicted [B, D]; unconditional, previous, variance [B, D] or null, each; eps [B, D] where
    // given; key or key_ptr where drawn; steps; h [B] where kClip and ratio > 0; x_next [B, D];
    // denoised [B, D] or null. T is the dtype of all but h.
    const __grid_constant__ DiffusionStepArgs a, const __grid_constant__ RowGrid grid) {
  constexpr int N = kWidth<T>;
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    if (!columns) return;
    const int64_t start = chunk * kChunk;
    const StepCoefficients step = read_step(a.steps, row);
    const float m = a.previous.data ? step.m : 0.0f;
    const bool dynamic = kClip && a.ratio > 0;
    const float h = dynamic ? a.h[row] : a.clip, by_h = dynamic ? 1.0f / h : 1.0f;
    const NoiseKey key = kNoise == Noise::drawn ? row_key(a, row) : NoiseKey{};
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
  });
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

template <class T>
static void launch_threshold(const DiffusionStepArgs& a, RowGrid grid, void* stream) {
  grid.log2_lanes = kSelectLog2;
  const unsigned blocks = a.rows < 65535 ? (unsigned)a.rows : 65535;
  threshold_kernel<T><<<blocks, kSelectThreads, 0, (cudaStream_t)stream>>>(a, grid);
  check_cuda("sampler_step", cudaGetLastError());
}

}  // namespace device

void diffusion_step_cuda(const DiffusionStepArgs& a, void* stream) {
  using device::Noise;
  const auto launch = [&](auto type, auto clip, const device::RowGrid& grid) {
    using T = decltype(type);
    const auto kernel = !a.noisy     ? &device::diffusion_step_kernel<T, clip, Noise::none>
                        : a.eps.data ? &device::diffusion_step_kernel<T, clip, Noise::given>
                                     : &device::diffusion_step_kernel<T, clip, Noise::drawn>;
    device::launch_rows("sampler_step", kernel, grid, stream, a);
  };
  device::with_dtype(
      a.rows, a.columns,
      {a.x, a.predicted, a.unconditional, a.previous, a.variance, a.eps, a.x_next, a.denoised},
      [&](auto type, const device::RowGrid& grid) {
        if (a.ratio > 0 && a.rows > 0) device::launch_threshold<decltype(type)>(a, grid, stream);
        if (a.clips()) return launch(type, std::true_type{}, grid);
        launch(type, std::false_type{}, grid);
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
