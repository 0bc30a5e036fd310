// Sums on the GPU in a fixed order: no atomics, the same bits every run.
#pragma once

#include "common/rows.cuh"

namespace gm {
namespace device {

// The sum of x over the lanes of a row chunk, in every lane. Lanes of more than a warp are a whole
// block, which must call this together.
template <class F>
static __device__ __forceinline__ F row_sum(F x, const RowGrid& grid) {
  const int lanes = 1 << grid.log2_lanes;
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) {
    const F other = __shfl_xor_sync(0xffffffffu, x, offset);
    if (offset < lanes) x += other;
  }
  if (lanes <= 32) return x;
  __shared__ F warps[kThreads / 32];
  __syncthreads();  // the sums of the row before have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int i = 1; i < lanes / 32; ++i) x += warps[i];
  return x;
}

// The sum of a group, as a tree.
template <int N>
static __device__ __forceinline__ float group_sum(const float (&x)[N]) {
  float sums[N];
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = x[i];
#pragma unroll
  for (int half = N / 2; half; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace device
}  // namespace gm
