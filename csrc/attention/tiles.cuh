// Tiles of rows in shared memory: how they get there, their products, and the way back to memory.
//
// Products are sums in fragments (mma.cuh). Tensor cores make those of 16-bit tiles; float32 tiles
// are multiplied by fma(), since TF32 would not keep float32's error, into the same places.
#pragma once

#include <type_traits>

#include "common/heads.h"
#include "common/mma.cuh"

namespace gm {
namespace device {

// Elements from row to row of a tile kWidth wide: an odd number of 16 bytes, so that eight rows
// lie in different banks.
template <class T, int kWidth>
constexpr int kTileRow = kWidth + 16 / (int)sizeof(T);

// Columns of a tile that heads of 3/4 of its width or less leave alone.
template <int kWidth>
constexpr int kTail = kWidth == 256 ? 64 : 32;

// Rows of a float32 tile's fragments in a warp's scratch.
template <int N>
constexpr int kScratchRow = 8 * N + 4;

template <class H>
using If16 = std::enable_if_t<sizeof(H) == 2>;

// Calls body(column) for every 16th column in use; the column is a constant once unrolled.
template <int kWidth, class Body>
static __device__ __forceinline__ void for_columns(bool full, Body body) {
#pragma unroll
  for (int d = 0; d < kWidth - kTail<kWidth>; d += 16) body(d);
  if (!full) return;
#pragma unroll
  for (int d = kWidth - kTail<kWidth>; d < kWidth; d += 16) body(d);
}

// The rows of one head.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
  int rows, width;
  bool vector;  // rows are whole vectors of 16 bytes at multiples of 16

  __device__ __forceinline__ HeadRows(const Heads& x, int64_t b, int64_t h, int rows, int width)
      : data((const T*)x.data + b * x.batch + h * x.head),
        stride(x.row),
        rows(rows),
        width(width),
        vector(((uint64_t)data | stride * sizeof(T) | width * sizeof(T)) % 16 == 0) {}
};

// Begins to copy rows [first, first + kRows) to a tile, by kThreads threads; zeros where there are
// none. commit_copies(), wait_copies() and a barrier make them readable.
template <int kWidth, int kRows, int kThreads, class T>
static __device__ __forceinline__ void copy_tile(T* tile, const HeadRows<T>& x, int first) {
  constexpr int kRow = kTileRow<T, kWidth>, kPer = 16 / (int)sizeof(T), kChunks = kWidth / kPer;
  const int used = x.width > kWidth - kTail<kWidth> ? kWidth : kWidth - kTail<kWidth>;
  if (x.vector) {
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, d = i % kChunks * kPer;
      const bool exists = first + row < x.rows && d < x.width;
      const T* from = exists ? x.data + (first + row) * x.stride + d : x.data;
      if (d < used) copy_async(tile + row * kRow + d, from, exists);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kWidth; i += kThreads) {
    const int row = i / kWidth, d = i % kWidth;
    const bool exists = first + row < x.rows && d < x.width;
    T value;
    narrow(0.0f, value);
    if (exists) value = x.data[(first + row) * x.stride + d];
    if (d < used) tile[row * kRow + d] = value;
  }
}

// Copies and uses `count` blocks in turn: copy(n, stage) begins to copy one into either of two
// stages while use(n, stage) reads the other. What was copied before arrives with the first.
template <class Copy, class Use>
static __device__ __forceinline__ void stream(int count, Copy copy, Use use) {
  if (count > 0) copy(0, 0);
  commit_copies();
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    if (n + 1 < count) copy(n + 1, (n + 1) & 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    use(n, n & 1);
    __syncthreads();
  }
  wait_copies<0>();
  __syncthreads();
}

// c += rows a (16 M of them) times rows b (8 N) transposed.
template <int kWidth, int M, int N, class H, class = If16<H>>
static __device__ __forceinline__ void product_of_rows(bool full, const H* a, const H* b,
                                                       float (&c)[M][N][4]) {
  static_assert(N % 2 == 0, "two fragments a load");
  constexpr int kRow = kTileRow<H, kWidth>;
  const int lane = threadIdx.x % 32;
  const H* a_row = a + lane % 16 * kRow + lane / 16 * 8;
  const H* b_row = b + (lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 8;
  for_columns<kWidth>(full, [&](int d) {
    uint32_t x[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(a_row + m * 16 * kRow + d, x[m]);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t y[4];
      load_matrices(b_row + n * 8 * kRow + d, y);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add(c[m][n], x[m], y[0], y[1], H{});
        multiply_add(c[m][n + 1], x[m], y[2], y[3], H{});
      }
    }
  });
}

static __device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  sum = __fmaf_rn(a.x, b.x, sum);
  sum = __fmaf_rn(a.y, b.y, sum);
  sum = __fmaf_rn(a.z, b.z, sum);
  return __fmaf_rn(a.w, b.w, sum);
}

template <int kWidth, int M, int N>
static __device__ __forceinline__ void product_of_rows(bool full, const float* a, const float* b,
                                                       float (&c)[M][N][4]) {
  constexpr int kRow = kTileRow<float, kWidth>;
  const int lane = threadIdx.x % 32;
  const float* a_row = a + lane / 4 * kRow;
  const float* b_row = b + lane % 4 * 2 * kRow;
  const int columns = full ? kWidth : kWidth - kTail<kWidth>;
  constexpr int kSteps = kWidth == 256 ? 2 : 4;  // registers are few there
#pragma unroll 1
  for (int d = 0; d < columns; d += 16) {
    float sum[M][N][4] = {};  // of 16 columns: short chains, small errors
#pragma unroll kSteps
    for (int i = d; i < d + 16; i += 4) {
      float4 x[M][2];
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) x[r / 2][r % 2] = *(const float4*)(a_row + r * 8 * kRow + i);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 y = *(const float4*)(b_row + (n * 8 + e) * kRow + i);
#pragma unroll
          for (int m = 0; m < M; ++m) {
            sum[m][n][e] = dot(x[m][0], y, sum[m][n][e]);
            sum[m][n][e + 2] = dot(x[m][1], y, sum[m][n][e + 2]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][n][e] += sum[m][n][e];
      }
    }
  }
}

// c += p [16 M, 8 N] in fragments, rounded to the dtype of b, times rows b [8 N, kWidth].
template <int kWidth, int M, int N, class H, class = If16<H>>
static __device__ __forceinline__ void product_with_rows(bool full, const float (&p)[M][N][4],
                                                         const H* b, float*,
                                                         float (&c)[M][kWidth / 8][4]) {
  static_assert(N % 2 == 0, "sixteen rows a product");
  constexpr int kRow = kTileRow<H, kWidth>;
  const int lane = threadIdx.x % 32;
  const H* b_row = b + lane % 16 * kRow + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t x[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      x[m][0] = narrow_pair(p[m][n], H{});
      x[m][1] = narrow_pair(p[m][n] + 2, H{});
      x[m][2] = narrow_pair(p[m][n + 1], H{});
      x[m][3] = narrow_pair(p[m][n + 1] + 2, H{});
    }
    for_columns<kWidth>(full, [&](int d) {
      uint32_t y[4];
      load_transposed(b_row + n * 8 * kRow + d, y);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add(c[m][d / 8], x[m], y[0], y[1], H{});
        multiply_add(c[m][d / 8 + 1], x[m], y[2], y[3], H{});
      }
    });
  }
}

// Through scratch [16 M, kScratchRow<N>] of the warp.
template <int kWidth, int M, int N>
static __device__ __forceinline__ void product_with_rows(bool full, const float (&p)[M][N][4],
                                                         const float* b, float* scratch,
                                                         float (&c)[M][kWidth / 8][4]) {
  constexpr int kRow = kTileRow<float, kWidth>;
  const int lane = threadIdx.x % 32;
  float* own = scratch + lane / 4 * kScratchRow<N>;
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float* pair = p[r / 2][n] + r % 2 * 2;
      *(float2*)(own + r * 8 * kScratchRow<N> + n * 8 + lane % 4 * 2) =
          make_float2(pair[0], pair[1]);
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int j = 0; j < 8 * N; ++j) {
    const float* b_row = b + j * kRow + lane % 4 * 2;
    float x[2 * M];
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) x[r] = own[r * 8 * kScratchRow<N> + j];
    for_columns<kWidth>(full, [&](int d) {
#pragma unroll
      for (int n = d / 8; n < d / 8 + 2; ++n) {
        const float2 y = *(const float2*)(b_row + n * 8);
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
          float* sum = c[r / 2][n] + r % 2 * 2;
          sum[0] = __fmaf_rn(x[r], y.x, sum[0]);
          sum[1] = __fmaf_rn(x[r], y.y, sum[1]);
        }
      }
    });
  }
  __syncwarp();
}

static __device__ __forceinline__ void store_pair(float* to, const float* x) {
  *(float2*)to = make_float2(x[0], x[1]);
}
template <class H>
static __device__ __forceinline__ void store_pair(H* to, const float* x) {
  *(uint32_t*)to = narrow_pair(x, H{});
}

// Rows of fragments, each times its factor, to rows [first, first + 16 M) of a contiguous
// [rows, width] output, as far as they exist. They pass through the warp's own rows of a tile that
// no thread reads any more, so that stores are 16 bytes wide.
template <int kWidth, int M, class T>
static __device__ __forceinline__ void write_rows(const float (&c)[M][kWidth / 8][4],
                                                  const float (&factor)[M][2], T* tile, T* out,
                                                  int first, int rows, int width) {
  constexpr int kRow = kTileRow<T, kWidth>, kPer = 16 / (int)sizeof(T), kChunks = kWidth / kPer;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const float times = factor[r / 2][r % 2];
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      const float* pair = c[r / 2][n] + r % 2 * 2;
      const float scaled[2] = {pair[0] * times, pair[1] * times};
      store_pair(tile + (r * 8 + lane / 4) * kRow + n * 8 + lane % 4 * 2, scaled);
    }
  }
  __syncwarp();
  out += (int64_t)first * width;
  rows -= first;
  if (((uint64_t)out | width * sizeof(T)) % 16 == 0) {
#pragma unroll 4
    for (int i = lane; i < 16 * M * kChunks; i += 32) {
      const int row = i / kChunks, d = i % kChunks * kPer;
      if (row < rows && d < width)
        *(uint4*)(out + (int64_t)row * width + d) = *(const uint4*)(tile + row * kRow + d);
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < 16 * M * kWidth; i += 32) {
    const int row = i / kWidth, d = i % kWidth;
    if (row < rows && d < width) out[(int64_t)row * width + d] = tile[row * kRow + d];
  }
}

}  // namespace device
}  // namespace gm
