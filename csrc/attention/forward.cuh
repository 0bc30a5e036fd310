// The forward kernel: a tile of queries a block, keys stream past.
#pragma once

#include "attention/scores.cuh"

namespace gm {
namespace device {

// A block: kWarps warps of 16 M rows each, own tiles that stay, two tiles of kColumns rows that
// stream past twice buffered.
template <class T, int kWidth_, int kWarps_, int M_, int kColumns_, int kOwn_>
struct Plan {
  using Type = T;
  static constexpr int kWidth = kWidth_, kWarps = kWarps_, M = M_, kColumns = kColumns_,
                       N = kColumns / 8, kThreads = 32 * kWarps, kWarpRows = 16 * M,
                       kRows = kWarps * kWarpRows;
  static constexpr int kRow = kTileRow<T, kWidth>, kOwnTile = kRows * kRow,
                       kStage = kColumns * kRow;
  static constexpr int kScratch = sizeof(T) == 4 ? kWarpRows * kScratchRow<N> : 0;  // of a warp
  static constexpr int kBytes =
      (kOwn_ * kOwnTile + 4 * kStage) * sizeof(T) + kWarps * kScratch * sizeof(float);
  static_assert(kBytes <= 99 * 1024, "what every GPU from sm_80 on has");

  T* memory = (T*)shared_memory();

  __device__ __forceinline__ static int warp() { return threadIdx.x / 32; }
  __device__ __forceinline__ static int warp_row() { return warp() * kWarpRows; }
  __device__ __forceinline__ T* own(int i) const { return memory + i * kOwnTile; }
  __device__ __forceinline__ T* own_warp(int i) const { return own(i) + warp_row() * kRow; }
  __device__ __forceinline__ T* first(int stage) const { return own(kOwn_) + stage * kStage; }
  __device__ __forceinline__ T* second(int stage) const {
    return own(kOwn_) + (2 + stage) * kStage;
  }
  __device__ __forceinline__ float* scratch() const {
    return (float*)(own(kOwn_) + 4 * kStage) + warp() * kScratch;
  }
};

template <class T, int kWidth>
using ForwardPlan = Plan<T, kWidth, sizeof(T) == 4 && kWidth == 256 ? 2 : 4,
                         kWidth == 64 || (kWidth == 128 && sizeof(T) == 2) ? 2 : 1,
                         sizeof(T) == 2 ? (kWidth == 64 ? 64 : 32) : (kWidth == 256 ? 8 : 16), 1>;

// Online softmax of a row (Milakov and Gimelshein 2018), of which each lane holds some columns.
template <class T>
struct Softmax {
  float top = -kInfinity;  // of the products
  float total = 0.0f;      // of this lane's powers

  // Products s[n][2 r], s[n][2 r + 1] become powers. Returns what earlier sums shrink by.
  template <int N>
  __device__ __forceinline__ float update(const Scores<T>& score, float (&s)[N][4], int r) {
    float larger = top;
#pragma unroll
    for (int n = 0; n < N; ++n) larger = fmaxf(larger, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
    larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 2));
    const float base = base_of(score, larger);
    const float shrink = exp2_for<T>(top * score.factor - base);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) sum += s[n][e] = score.power(s[n][e], base);
    }
    top = larger;
    total = total * shrink + sum;
    return shrink;
  }

  // lse in nats and 1 / total; 0 for a row that has seen nothing.
  __device__ __forceinline__ void finish(const Scores<T>& score, float& lse, float& inverse) {
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    lse = total == 0.0f ? -kInfinity : __fmaf_rn(base_of(score, top), kLn2, log(total));
    inverse = total == 0.0f ? 0.0f : 1.0f / total;
  }

 private:
  static __device__ __forceinline__ float base_of(const Scores<T>& score, float top) {
    return top == -kInfinity ? 0.0f : top * score.factor;
  }
};

template <class P, class T = typename P::Type>
__global__ void __launch_bounds__(P::kThreads, 2) attention_forward_kernel(
    // q [B, H, Tq, D]; k, v [B, Hkv, Tk, D], v read where has_values; key_mask [B, Tk] or null;
    // bounds [2, Tq] or null; o_out [B, H, Tq, D] contiguous, written where has_values; lse_out
    // [B, H, Tq]. T is the dtype of q, k, v and o.
    const __grid_constant__ AttentionCudaArgs a) {
  constexpr int M = P::M, N = P::N, kWidth = P::kWidth;
  const P plan;
  const Scores<T> score(a);
  const int queries = (int)a.queries, keys = (int)a.keys, width = (int)a.width;
  const int tiles = (queries + P::kRows - 1) / P::kRows;
  const int64_t pair = blockIdx.x / tiles, b = pair / a.heads, h = pair % a.heads;
  const int tile = (tiles - 1 - (int)(blockIdx.x % tiles)) * P::kRows;  // what sees most first
  const int first = tile + P::warp_row();
  const bool full = width > kWidth - kTail<kWidth>;
  const auto find = [&](int i) { return keys_of(a, i); };
  const Span span(tile, P::kRows, queries, find), own(first, P::kWarpRows, queries, find);
  const int begin = span.template begin<P::kColumns>();
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  const HeadRows<T> k(a.k, b, kv_head, keys, width), v(a.v, b, kv_head, keys, width);
  const uint8_t* mask = a.key_mask ? a.key_mask + b * keys : nullptr;
  copy_tile<kWidth, P::kRows, P::kThreads>(plan.own(0), HeadRows<T>(a.q, b, h, queries, width),
                                           tile);

  float o[M][kWidth / 8][4] = {};
  Softmax<T> softmax[M][2];
  const auto copy = [&](int n, int stage) {
    const int j = begin + n * P::kColumns;
    copy_tile<kWidth, P::kColumns, P::kThreads>(plan.first(stage), k, j);
    if (a.has_values) copy_tile<kWidth, P::kColumns, P::kThreads>(plan.second(stage), v, j);
  };
  const auto use = [&](int block, int stage) {
    const int j = begin + block * P::kColumns;
    if (!own.sees(j, P::kColumns)) return;
    float s[M][N][4] = {};
    product_of_rows<kWidth>(full, plan.own_warp(0), plan.first(stage), s);
    score.cap(s);
    if (mask || !own.sees_all(j, P::kColumns)) {
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
        const int i = row_of(first, r / 2, r % 2);
        const Interval seen = i < queries ? keys_of(a, i) : Interval{0, 0};
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = column_of(j, n, e);
            if (!seen.has(key) || (mask && !mask[key])) s[r / 2][n][r % 2 * 2 + e] = -kInfinity;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      const float shrink = softmax[r / 2][r % 2].update(score, s[r / 2], r % 2);
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        o[r / 2][n][r % 2 * 2] *= shrink;
        o[r / 2][n][r % 2 * 2 + 1] *= shrink;
      }
    }
    if (a.has_values) product_with_rows<kWidth>(full, s, plan.second(stage), plan.scratch(), o);
  };
  stream(span.template blocks<P::kColumns>(), copy, use);

  float inverse[M][2];
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    float lse;
    softmax[r / 2][r % 2].finish(score, lse, inverse[r / 2][r % 2]);
    const int i = row_of(first, r / 2, r % 2);
    if (i < queries && threadIdx.x % 4 == 0) a.lse_out[pair * queries + i] = lse;
  }
  if (!a.has_values) return;
  T* out = (T*)a.o_out + pair * queries * (int64_t)width;
  write_rows<kWidth>(o, inverse, plan.own_warp(0), out, first, queries, width);
}

}  // namespace device
}  // namespace gm
