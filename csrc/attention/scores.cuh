// What a query sees, on the GPU, and what becomes of its products with keys.
#pragma once

#include "attention/attention.h"
#include "attention/tiles.cuh"
#include "common/math.h"

namespace gm {
namespace device {

constexpr float kInfinity = __builtin_inff();

struct Interval {
  int low, high;  // empty unless low < high

  __device__ __forceinline__ bool has(int i) const { return i >= low && i < high; }
};

// The keys that query i < Tq sees, key_mask aside. Both ends never decrease with i.
static __device__ __forceinline__ Interval keys_of(const AttentionCudaArgs& a, int i) {
  Interval seen{0, (int)a.keys};
  if (a.bounds) seen = {a.bounds[i], a.bounds[a.queries + i]};
  if (!a.causal) return seen;
  const int end = max(i + 1 + (int)(a.keys - a.queries), 0);
  if (a.window > 0) seen.low = max(seen.low, end - a.window);
  return {seen.low, min(seen.high, end)};
}

// The queries that see key j < Tk: the other side of keys_of().
static __device__ __forceinline__ Interval queries_of(const AttentionCudaArgs& a, int j) {
  Interval seen{0, (int)a.queries};
  if (a.bounds) seen = {a.bounds[j], a.bounds[a.queries + j]};
  if (!a.causal) return seen;
  const int place = j - (int)(a.keys - a.queries);
  if (a.window > 0) seen.high = min(seen.high, place + a.window);
  return {max(seen.low, place), seen.high};
}

// What rows [first, first + count) of `rows` see together: anything, and each of them.
struct Span {
  Interval any, all;

  template <class Find>
  __device__ __forceinline__ Span(int first, int count, int rows, Find find)
      : any{0, 0}, all{0, 0} {
    if (first >= rows) return;
    const Interval top = find(first), bottom = find(min(first + count, rows) - 1);
    any = {max(top.low, 0), bottom.high};
    all = {bottom.low, top.high};
  }

  // Blocks of kBlock columns from the multiple of kBlock before the first that is seen.
  template <int kBlock>
  __device__ __forceinline__ int begin() const {
    return any.low / kBlock * kBlock;
  }
  template <int kBlock>
  __device__ __forceinline__ int blocks() const {
    return any.low < any.high ? (any.high - begin<kBlock>() + kBlock - 1) / kBlock : 0;
  }
  // Whether any of columns [i, i + count) is seen; whether all of them are by every row.
  __device__ __forceinline__ bool sees(int i, int count) const {
    return i < any.high && i + count > any.low;
  }
  __device__ __forceinline__ bool sees_all(int i, int count) const {
    return i >= all.low && i + count <= all.high;
  }
};

// 2^x for x <= 127, 0 where the result is below 2^-125. Float32 tiles take a polynomial, 8e-8 from
// the truth: twice ex2's 2.4e-7 would leave the sums outside the bound of eager PyTorch.
template <class T>
static __device__ __forceinline__ float exp2_for(float x) {
  if constexpr (sizeof(T) == 2) return exp2_fast(x);
  const float y = max_keeping_nan(min_keeping_nan(x, 127.0f), -126.0f);
  const float n = round_to_integer(y), r = y - n;
  float p = fma(r, 0.00015353360504377633f, 0.0013398875016719103f);
  p = fma(p, r, 0.00961843691766262f);
  p = fma(p, r, 0.055503323674201965f);
  p = fma(p, r, 0.24022647738456726f);
  p = fma(p, r, 0.6931471824645996f);
  p = fma(p, r, 1.0f);
  return x < -125.0f ? 0.0f : from_bits(bits(p) + to_int(n) * 0x800000);
}

// tanh(x); 16-bit tiles take an approximate power and quotient, 4e-7 from the truth.
template <class T>
static __device__ __forceinline__ float tanh_for(float x) {
  if constexpr (sizeof(T) == 4) return tanh(x);
  const float a = fabsf(x);
  const float far = 1.0f - __fdividef(2.0f, exp2_fast(a * (2.0f * kLog2E)) + 1.0f);
  return a < 0.6f ? tanh_near(x) : copysignf(far, x);
}

// Products x = q k, under a softcap tanh(scale x / softcap), times `factor` are scores in powers of
// two. factor is never 0, so that -inf times it is -inf: what is not seen.
template <class T>
struct Scores {
  float factor, inner;
  bool is_capped;

  __device__ __forceinline__ explicit Scores(const AttentionCudaArgs& a)
      : factor(fmaxf((a.softcap > 0.0f ? a.softcap : a.scale) * kLog2E, 0x1p-126f)),
        inner(a.softcap > 0.0f ? a.scale / a.softcap : 0.0f),
        is_capped(a.softcap > 0.0f) {}

  template <int M, int N>
  __device__ __forceinline__ void cap(float (&s)[M][N][4]) const {
    if (!is_capped) return;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] = tanh_for<T>(s[m][n][e] * inner);
      }
    }
  }

  // 2^(factor x - base)
  __device__ __forceinline__ float power(float x, float base) const {
    return exp2_for<T>(__fmaf_rn(x, factor, -base));
  }

  // Of x with its row's lse in powers of two and delta: x becomes p, dp the gradient of x / scale.
  __device__ __forceinline__ void gradient(float& x, float& dp, float lse, float delta,
                                           bool seen) const {
    const float p = seen ? power(x, lse) : 0.0f;
    float ds = p * (dp - delta);
    if (is_capped) ds *= __fmaf_rn(-x, x, 1.0f);
    x = p;
    dp = seen ? ds : 0.0f;
  }
};

// Row m, r of a warp's fragments from row `first` on, and column n, e of them from column `start`.
static __device__ __forceinline__ int row_of(int first, int m, int r) {
  return first + m * 16 + r * 8 + threadIdx.x % 32 / 4;
}
static __device__ __forceinline__ int column_of(int start, int n, int e) {
  return start + n * 8 + threadIdx.x % 4 * 2 + e;
}

}  // namespace device
}  // namespace gm
