// The threshold of dynamic thresholding on the GPU: an exact quantile of a row by radix select,
// without a sort or memory of its own.
#pragma once

#include "common/rows.cuh"
#include "diffusion_step/diffusion_step.h"

namespace gm {
namespace device {

constexpr int kSelectLog2 = 9, kSelectThreads = 1 << kSelectLog2;  // a block, which has a row
constexpr int kDigit = 11, kBins = 1 << kDigit;                    // bits a pass
constexpr int kBinsEach = kBins / kSelectThreads;                  // bins of a thread

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
  const uint32_t first = kBinsEach * threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) sum += histogram[first + i];
  const uint32_t own = sum;
#pragma unroll
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  for (uint32_t i = 0; i < warp; ++i) sum += warps[i];
  uint32_t before = sum - own;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    const uint32_t count = histogram[first + i];
    if (before <= rank && rank - before < count) found = {first + i, count, rank - before};
    before += count;
  }
  __syncthreads();
  return found;
}

// The quantile between two order statistics, as torch.lerp rounds it, within [1, clip]. Infinity
// counts as the largest number.
static __device__ __forceinline__ float threshold_of(float below, float above, float weight,
                                                     float clip) {
  constexpr float kLargest = 0x1.fffffep127f;
  below = fminf(below, kLargest), above = fminf(above, kLargest);
  const float gap = above - below;
  const float x = weight < 0.5f ? below + weight * gap : above - gap * (1.0f - weight);
  return fminf(fmaxf(x, 1.0f), clip);
}

// h of a row, for the threads of a block together: radix select over the bits of |x0|, 11 in each
// of two passes, 9 in the last. Integer atomics in shared memory alone, whose order does not
// matter.
template <class T>
static __device__ __forceinline__ float find_threshold(const DiffusionStepArgs& a,
                                                       const RowGrid& grid,
                                                       const StepCoefficients& step, int64_t row) {
  __shared__ uint32_t histogram[kBins], next;
  if (grid.columns == 0) return 1.0f;
  const double place = a.ratio * (double)(grid.columns - 1);
  const uint32_t rank = (uint32_t)place;
  Found found = {0, 0, rank};
  uint32_t below = 0, above = ~0u;  // bits of the two order statistics
  for (int pass = 0; pass < 3; ++pass) {
    // Bin i counts the values from below + i 2^shift on; above is the least one past the bins.
    const int shift = max(20 - kDigit * pass, 0);
    bool bad = false;
    above = ~0u;
    __syncthreads();  // all have read what is cleared here
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) histogram[threadIdx.x + i * kSelectThreads] = 0;
    if (threadIdx.x == 0) next = ~0u;
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
    if (__syncthreads_or(bad)) return from_bits(0x7fc00000);
    found = find_rank(histogram, found.rank);
    below += found.bin << shift;
  }
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    const uint32_t bin = threadIdx.x + i * kSelectThreads;
    if (bin > found.bin && histogram[bin]) above = min(above, below + (bin - found.bin));
  }
  atomicMin(&next, above);
  __syncthreads();
  // The last of all has no other above it.
  above = found.rank + 1 < found.count || next == ~0u ? below : next;
  return threshold_of(from_bits(below), from_bits(above), (float)(place - (double)rank), a.clip);
}

}  // namespace device
}  // namespace gm
