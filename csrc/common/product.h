// The matrix product of attention and of code search: C[r, lanes] (+)= sum_k A(r, k) B[k, lanes],
// with A read one word at a time and spread over the lanes, and B and C read as vectors. Sums stay
// in registers and begin with 0: what C held is added last, so that a sum over many blocks rounds
// once a block at its full size.
#pragma once

#include "common/simd.h"

namespace gm {
namespace GM_ISA {

// A word is one float32.
struct Single {
  using Word = float;
  static constexpr int kPer = 1;  // values of k a word
  static vf dot(vf sum, const float* a, vf b) { return fma(splat<vf>(*a), b, sum); }
};

#if defined(__AVX512BF16__)
// A word is two bfloat16 of neighbouring k, the lower first.
struct Pairs {
  using Word = uint32_t;
  static constexpr int kPer = 2;
  static vf dot(vf sum, const uint32_t* a, vf b) {
    int32_t pair;
    memcpy(&pair, a, 4);  // bfloat16 rows start at even addresses
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
};
#endif

// Registers: kRows * kColumns sums, kColumns vectors of B and one word of A.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

// Where A, B and C lie: strides in words for A and B, in floats for C.
template <class S>
struct Product {
  const typename S::Word* a;
  int64_t a_row, a_step;
  const typename S::Word* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  int64_t steps;  // words of k
};

template <class S, int R, int C, bool kAdd>
static inline void product_tile(const Product<S>& p) {
  vf sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = vf{};
  const typename S::Word *a = p.a, *b = p.b;
  for (int64_t k = 0; k < p.steps; ++k, a += p.a_step, b += p.b_step) {
    vf x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) memcpy(&x[c], b + c * kLanes, sizeof(vf));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = S::dot(sum[r][c], a + r * p.a_row, x[c]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* at = p.c + r * p.c_row + c * kLanes;
      store<vf>(at, kAdd ? load<vf>(at) + sum[r][c] : sum[r][c]);
    }
}

template <class S, int C, bool kAdd>
static inline void product_rows(const Product<S>& p, int64_t rows) {
  switch (rows) {
    case 1:
      return product_tile<S, 1, C, kAdd>(p);
    case 2:
      return product_tile<S, 2, C, kAdd>(p);
    case 3:
      return product_tile<S, 3, C, kAdd>(p);
    case 4:
      return product_tile<S, 4, C, kAdd>(p);
    case 5:
      return product_tile<S, 5, C, kAdd>(p);
    default:
      return product_tile<S, 6, C, kAdd>(p);
  }
}

template <class S, bool kAdd>
static inline void product_columns(const Product<S>& p, int64_t rows, int64_t vectors) {
  static_assert(kRows == 6 && kColumns <= 4, "the switches name every size of a tile");
  if constexpr (kColumns == 4) {
    if (vectors >= 4) return product_rows<S, 4, kAdd>(p, rows);
    if (vectors == 3) return product_rows<S, 3, kAdd>(p, rows);
  }
  if (vectors >= 2) return product_rows<S, 2, kAdd>(p, rows);
  return product_rows<S, 1, kAdd>(p, rows);
}

// All of C: `rows` by `vectors` vectors.
template <class S, bool kAdd>
static inline void product(const Product<S>& p, int64_t rows, int64_t vectors) {
  for (int64_t v = 0; v < vectors; v += kColumns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      Product<S> tile = p;
      tile.a += r * p.a_row;
      tile.b += v * kLanes;
      tile.c += r * p.c_row + v * kLanes;
      const int64_t left = rows - r;
      product_columns<S, kAdd>(tile, left < kRows ? left : kRows, vectors - v);
    }
  }
}

}  // namespace GM_ISA
}  // namespace gm
