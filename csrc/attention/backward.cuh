// The backward's kernels: statistics of queries, dq by tiles of queries, dk and dv by tiles of
// keys. Nothing is added to memory, so sums have a fixed order.
#pragma once

#include "attention/forward.cuh"

namespace gm {
namespace device {

template <class T, int kWidth>
using QueryPlan =
    Plan<T, kWidth, sizeof(T) == 4 && kWidth == 256 ? 2 : 4, kWidth == 64 && sizeof(T) == 2 ? 2 : 1,
         sizeof(T) == 2 ? (kWidth == 256 ? 16 : 32) : (kWidth == 64 ? 16 : 8), 2>;
template <class T, int kWidth>
using KeyPlan =
    Plan<T, kWidth, sizeof(T) == 4 && kWidth == 256 ? 2 : 4, 1,
         sizeof(T) == 2 ? (4096 / kWidth < 64 ? 4096 / kWidth : 64) : (kWidth == 64 ? 16 : 8), 2>;

constexpr int kStatisticsLanes = 8;  // that share a row
constexpr int kStatisticsThreads = 256;

// lse in powers of two, 0 where no key is seen, and delta = sum_d o do - dlse; zeros behind Tq.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads) attention_statistics_kernel(
    // o, dout [B, H, Tq, D], read where dout is given; lse, dlse [B, H, Tq], dlse or null;
    // statistics [B, H, padded Tq, 2]. T is the dtype of o and dout.
    const __grid_constant__ AttentionCudaArgs a, int64_t rows) {
  const int64_t at = (blockIdx.x * (int64_t)kStatisticsThreads + threadIdx.x) / kStatisticsLanes;
  const int lane = threadIdx.x % kStatisticsLanes;
  const int64_t padded = rows / (a.batches * a.heads), pair = at / padded, i = at % padded;
  const bool exists = at < rows && i < a.queries;
  const int64_t b = pair / a.heads, h = pair % a.heads, row = pair * a.queries + i;
  float sum = 0.0f;
  if (exists && a.dout.data) {
    const int width = (int)a.width;
    const HeadRows<T> o(a.o, b, h, 0, width), dout(a.dout, b, h, 0, width);
    const T *x = o.data + i * o.stride, *dx = dout.data + i * dout.stride;
    constexpr int kGroup = kWidth<T>;
    const auto add = [&](auto vector, int g, int count) {
      float u[kGroup], du[kGroup];
      load_group<decltype(vector)::value>(x, g, count, u);
      load_group<decltype(vector)::value>(dx, g, count, du);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) sum = __fmaf_rn(u[e], du[e], sum);
    };
    if (o.vector && dout.vector) {
      for (int g = lane; g < width / kGroup; g += kStatisticsLanes)
        add(std::true_type{}, g, kGroup);
    } else {
      for (int g = lane; g * kGroup < width; g += kStatisticsLanes)
        add(std::false_type{}, g, min(width - g * kGroup, kGroup));
    }
  }
#pragma unroll
  for (int offset = kStatisticsLanes / 2; offset; offset /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (at >= rows || lane) return;
  const float lse = exists ? a.lse[row] : 0.0f;
  if (exists && a.dlse) sum -= a.dlse[row];
  ((float2*)a.statistics)[at] = make_float2(lse == -kInfinity ? 0.0f : lse * kLog2E, sum);
}

// Products s and dp to probabilities and gradients, of columns from `start` on: row(r) is what row
// r of a fragment sees, statistics(r, n) of rows or columns those of products (r, n).
template <int M, int N, class T, class See, class Statistics>
static __device__ __forceinline__ void score_gradients(const Scores<T>& score, float (&s)[M][N][4],
                                                       float (&dp)[M][N][4], See see,
                                                       Statistics statistics) {
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 x = statistics(r, n, e);
        const int at = r % 2 * 2 + e;
        score.gradient(s[r / 2][n][at], dp[r / 2][n][at], x.x, x.y, see(r, n, e));
      }
    }
  }
}

template <class P, class T = typename P::Type>
__global__ void __launch_bounds__(P::kThreads, 2) attention_dq_kernel(
    // q, dout [B, H, Tq, D], dout or null; k, v [B, Hkv, Tk, D], v read with dout; key_mask [B, Tk]
    // or null; bounds [2, Tq] or null; statistics; dq [B, H, Tq, D] contiguous. T is the dtype of
    // q, k, v, dout and dq.
    const __grid_constant__ AttentionCudaArgs a) {
  constexpr int M = P::M, N = P::N, kWidth = P::kWidth;
  const P plan;
  const Scores<T> score(a);
  const int queries = (int)a.queries, keys = (int)a.keys, width = (int)a.width;
  const int tiles = (queries + P::kRows - 1) / P::kRows;
  const int64_t pair = blockIdx.x / tiles, b = pair / a.heads, h = pair % a.heads;
  const int tile = (tiles - 1 - (int)(blockIdx.x % tiles)) * P::kRows;
  const int first = tile + P::warp_row();
  const bool full = width > kWidth - kTail<kWidth>, has_dout = a.dout.data;
  const auto find = [&](int i) { return keys_of(a, i); };
  const Span span(tile, P::kRows, queries, find), own(first, P::kWarpRows, queries, find);
  const int begin = span.template begin<P::kColumns>();
  const int64_t kv_head = h / (a.heads / a.kv_heads);
  const HeadRows<T> k(a.k, b, kv_head, keys, width), v(a.v, b, kv_head, keys, width);
  const uint8_t* mask = a.key_mask ? a.key_mask + b * keys : nullptr;
  copy_tile<kWidth, P::kRows, P::kThreads>(plan.own(0), HeadRows<T>(a.q, b, h, queries, width),
                                           tile);
  if (has_dout)
    copy_tile<kWidth, P::kRows, P::kThreads>(plan.own(1), HeadRows<T>(a.dout, b, h, queries, width),
                                             tile);
  float2 statistics[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const int i = row_of(first, r / 2, r % 2);
    statistics[r] = make_float2(0.0f, 0.0f);
    if (i < queries)
      statistics[r] = ((const float2*)a.statistics)[pair * padded_queries(a.queries) + i];
  }

  float dq[M][kWidth / 8][4] = {};
  const auto copy = [&](int n, int stage) {
    const int j = begin + n * P::kColumns;
    copy_tile<kWidth, P::kColumns, P::kThreads>(plan.first(stage), k, j);
    if (has_dout) copy_tile<kWidth, P::kColumns, P::kThreads>(plan.second(stage), v, j);
  };
  const auto use = [&](int block, int stage) {
    const int j = begin + block * P::kColumns;
    if (!own.sees(j, P::kColumns)) return;
    float s[M][N][4] = {}, dp[M][N][4] = {};
    product_of_rows<kWidth>(full, plan.own_warp(0), plan.first(stage), s);
    if (has_dout) product_of_rows<kWidth>(full, plan.own_warp(1), plan.second(stage), dp);
    score.cap(s);
    const auto of_row = [&](int r, int, int) { return statistics[r]; };
    if (mask || !own.sees_all(j, P::kColumns)) {
      Interval seen[2 * M];
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
        const int i = row_of(first, r / 2, r % 2);
        seen[r] = i < queries ? keys_of(a, i) : Interval{0, 0};
      }
      const auto see = [&](int r, int n, int e) {
        const int key = column_of(j, n, e);
        return seen[r].has(key) && (!mask || mask[key]);
      };
      score_gradients(score, s, dp, see, of_row);
    } else {
      score_gradients(score, s, dp, [](int, int, int) { return true; }, of_row);
    }
    product_with_rows<kWidth>(full, dp, plan.first(stage), plan.scratch(), dq);
  };
  stream(span.template blocks<P::kColumns>(), copy, use);

  float factor[M][2];
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) factor[r / 2][r % 2] = a.scale;
  T* out = (T*)a.dq + pair * queries * (int64_t)width;
  write_rows<kWidth>(dq, factor, plan.own_warp(0), out, first, queries, width);
}

// dk, dv or both: transposed products, rows are keys. Each query head of the group streams past.
template <class P, bool kDk, bool kDv, class T = typename P::Type>
__global__ void __launch_bounds__(P::kThreads, 2) attention_dkdv_kernel(
    // As attention_dq_kernel(), with dk and dv [B, Hkv, Tk, D] contiguous, each or null.
    const __grid_constant__ AttentionCudaArgs a) {
  constexpr int M = P::M, N = P::N, kWidth = P::kWidth;
  const P plan;
  const Scores<T> score(a);
  const int queries = (int)a.queries, keys = (int)a.keys, width = (int)a.width;
  const int tiles = (keys + P::kRows - 1) / P::kRows;
  const int64_t pair = blockIdx.x / tiles, b = pair / a.kv_heads, kv_head = pair % a.kv_heads;
  const int tile = (int)(blockIdx.x % tiles) * P::kRows;  // what most see first
  const int first = tile + P::warp_row();
  const bool full = width > kWidth - kTail<kWidth>, has_dout = a.dout.data;
  const auto find = [&](int j) { return queries_of(a, j); };
  const Span span(tile, P::kRows, keys, find), own(first, P::kWarpRows, keys, find);
  const int begin = span.template begin<P::kColumns>();
  const int blocks = span.template blocks<P::kColumns>();
  const int group = (int)(a.heads / a.kv_heads);
  const int64_t head = kv_head * group;
  const uint8_t* mask = a.key_mask ? a.key_mask + b * keys : nullptr;
  copy_tile<kWidth, P::kRows, P::kThreads>(plan.own(0), HeadRows<T>(a.k, b, kv_head, keys, width),
                                           tile);
  if (kDk && has_dout)
    copy_tile<kWidth, P::kRows, P::kThreads>(plan.own(1), HeadRows<T>(a.v, b, kv_head, keys, width),
                                             tile);

  float dk[kDk ? M : 1][kDk ? kWidth / 8 : 1][4] = {},
                                           dv[kDv ? M : 1][kDv ? kWidth / 8 : 1][4] = {};
  const auto copy = [&](int n, int stage) {
    const int i = begin + n % blocks * P::kColumns;
    const int64_t h = head + n / blocks;
    copy_tile<kWidth, P::kColumns, P::kThreads>(plan.first(stage),
                                                HeadRows<T>(a.q, b, h, queries, width), i);
    if (has_dout)
      copy_tile<kWidth, P::kColumns, P::kThreads>(plan.second(stage),
                                                  HeadRows<T>(a.dout, b, h, queries, width), i);
  };
  const auto use = [&](int block, int stage) {
    const int i = begin + block % blocks * P::kColumns;
    if (!own.sees(i, P::kColumns)) return;
    // Of queries 2 t and 2 t + 1 of each fragment; those behind Tq are zeros.
    float4 statistics[N];
    const int64_t row = (b * a.heads + head + block / blocks) * padded_queries(a.queries);
#pragma unroll
    for (int n = 0; n < N; ++n)
      statistics[n] = ((const float4*)a.statistics)[(row + column_of(i, n, 0)) / 2];
    float s[M][N][4] = {}, dp[M][N][4] = {};
    product_of_rows<kWidth>(full, plan.own_warp(0), plan.first(stage), s);
    if (kDk && has_dout) product_of_rows<kWidth>(full, plan.own_warp(1), plan.second(stage), dp);
    score.cap(s);
    const auto of_column = [&](int, int n, int e) {
      const float4 x = statistics[n];
      return e ? make_float2(x.z, x.w) : make_float2(x.x, x.y);
    };
    if (mask || !own.sees_all(i, P::kColumns)) {
      Interval seen[2 * M];
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
        const int j = row_of(first, r / 2, r % 2);
        seen[r] = j < keys && (!mask || mask[j]) ? queries_of(a, j) : Interval{0, 0};
      }
      const auto see = [&](int r, int n, int e) { return seen[r].has(column_of(i, n, e)); };
      score_gradients(score, s, dp, see, of_column);
    } else {
      score_gradients(score, s, dp, [](int, int, int) { return true; }, of_column);
    }
    if constexpr (kDv) {
      if (has_dout && a.dv)
        product_with_rows<kWidth>(full, s, plan.second(stage), plan.scratch(), dv);
    }
    if constexpr (kDk) {
      if (a.dk) product_with_rows<kWidth>(full, dp, plan.first(stage), plan.scratch(), dk);
    }
  };
  stream(blocks * group, copy, use);

  const int64_t at = pair * keys * (int64_t)width;
  const auto write = [&](const auto& sums, float scale, int tile, void* to) {
    float factor[M][2];
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) factor[r / 2][r % 2] = scale;
    if (to) write_rows<kWidth>(sums, factor, plan.own_warp(tile), (T*)to + at, first, keys, width);
  };
  if constexpr (kDk) write(dk, a.scale, 0, a.dk);
  if constexpr (kDv) write(dv, 1.0f, 1, a.dv);
}

}  // namespace device
}  // namespace gm
