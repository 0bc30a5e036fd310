// Vector types and the handful of operations that GCC/Clang vector extensions lack.
//
// The formulas of the library are templates over F: `float` gives the tail of a loop, `vf` its
// body.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace gm {
namespace GM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <class T, int N>
struct vec_of {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
using vf = vec_of<float, kLanes>::type;
using vi = vec_of<int32_t, kLanes>::type;
using vu = vec_of<uint32_t, kLanes>::type;
using vd = vec_of<double, kLanes / 2>::type;
using vu64 = vec_of<uint64_t, kLanes / 2>::type;

template <class F>
struct traits {
  using I = int32_t;
  static constexpr int lanes = 1;
};
template <>
struct traits<vf> {
  using I = vi;
  static constexpr int lanes = kLanes;
};
template <class F>
using int_of = typename traits<F>::I;

static inline int32_t bits(float x) {
  int32_t i;
  memcpy(&i, &x, 4);
  return i;
}
static inline float from_bits(int32_t i) {
  float x;
  memcpy(&x, &i, 4);
  return x;
}
static inline vi bits(vf x) { return (vi)x; }
static inline vf from_bits(vi i) { return (vf)i; }
static inline int32_t to_int(float x) { return (int32_t)x; }
static inline vi to_int(vf x) { return __builtin_convertvector(x, vi); }
static inline float to_float(int32_t i) { return (float)i; }
static inline float to_float(uint32_t i) { return (float)i; }
static inline vf to_float(vu i) { return __builtin_convertvector(i, vf); }
static inline vf to_float(vi i) { return __builtin_convertvector(i, vf); }

template <class F>
static inline F splat(float x) {
  return x - F{};  // unlike a sum with 0 this is x for every x, and costs nothing
}

// Unaligned loads and stores; width follows F.
template <class F>
static inline F load(const float* p) {
  F x;
  memcpy(&x, p, sizeof(F));
  return x;
}
template <class F>
static inline void store(float* p, F x) {
  memcpy(p, &x, sizeof(F));
}

// A store past the caches to a multiple of sizeof(V): half of the traffic of a store to memory that
// is not cached. stream_fence() comes after the last one.
template <class V>
static inline void stream(void* p, V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)x);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)x);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)x);
#endif
  memcpy(p, &x, sizeof(V));
}
static inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// mask ? a : b, lane by lane. Masks are what comparisons of F give.
static inline float select(bool mask, float a, float b) { return mask ? a : b; }
static inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }

// Correctly rounded square root, in every object.
static inline float sqrt_ieee(float x) { return __builtin_sqrtf(x); }
static inline vf sqrt_ieee(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// The smaller and the larger of x and a bound; NaN stays.
static inline float min_keeping_nan(float x, float bound) { return x > bound ? bound : x; }
static inline float max_keeping_nan(float x, float bound) { return x < bound ? bound : x; }
static inline vf min_keeping_nan(vf x, float bound) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);  // minps returns its second of a NaN
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return select(x > bound, splat<vf>(bound), x);
#endif
}
static inline vf max_keeping_nan(vf x, float bound) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return select(x < bound, splat<vf>(bound), x);
#endif
}

// Round to nearest even for |x| < 2^22: adding 1.5 2^23 leaves no room for a fraction.
static inline float round_to_integer(float x) { return (x + 12582912.0f) - 12582912.0f; }
static inline vf round_to_integer(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + 12582912.0f) - 12582912.0f;
#endif
}

// x 2^n for an integer n from -160 to 130; results below the normal range round once.
static inline float scale_by_power(float x, float n) {
  const int32_t k = (int32_t)n, half = k >> 1;
  return x * from_bits((half + 127) << 23) * from_bits((k - half + 127) << 23);
}
static inline vf scale_by_power(vf x, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const vi k = to_int(n), half = k >> 1;
  return x * from_bits((half + 127) << 23) * from_bits((k - half + 127) << 23);
#endif
}

// a / b to an ulp for normal b with a normal 1 / b: the divider is slow where a step of Newton's is
// at hand.
static inline float quotient(float a, float b) { return a / b; }
static inline vf quotient(vf a, vf b) {
#if defined(__AVX512F__)
  const __m512 r = _mm512_rcp14_ps((__m512)b);
  const __m512 q = _mm512_mul_ps((__m512)a, r);
  return (vf)_mm512_fmadd_ps(_mm512_fnmadd_ps(q, (__m512)b, (__m512)a), r, q);
#else
  return a / b;
#endif
}

// a * b + c: one rounding where the hardware has it, two in the portable object. Never in the
// noise.
static inline float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Sum of the lanes in a fixed order: the upper half to the lower, until one is left.
static inline float sum_lanes(float x) { return x; }
static inline float sum_lanes(vf x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512 upper = _mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xee);
  const __m256 y = _mm512_castps512_ps256(_mm512_add_ps((__m512)x, upper));
#else
  const __m256 y = (__m256)x;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}
static inline float max_lanes(vf x) {
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  return top;
}

// Philox on vectors: each 32-bit word lives in the low half of a 64-bit lane, where one multiply
// gives both halves of the product. The high halves hold rubbish that no step reads.
static inline void mulhilo(vu64 a, uint32_t m, vu64& hi, vu64& lo) {
#if defined(__AVX512F__)
  lo = (vu64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  lo = (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  lo = (vu64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  lo = (a & 0xffffffffu) * (uint64_t)m;
#endif
  hi = lo >> 32;
}

// even[i], odd[i] -> words 2i and 2i + 1.
static inline vu interleave_words(vu64 even, vu64 odd) {
  return (vu)((even & 0xffffffffu) | (odd << 32));
}

// Transposes four vectors: out[4 i + j] = x[j][i].
static inline void store_transposed4(float* out, vf x0, vf x1, vf x2, vf x3) {
#if defined(__AVX512F__)
  const __m512 lo01 = _mm512_unpacklo_ps((__m512)x0, (__m512)x1);
  const __m512 hi01 = _mm512_unpackhi_ps((__m512)x0, (__m512)x1);
  const __m512 lo23 = _mm512_unpacklo_ps((__m512)x2, (__m512)x3);
  const __m512 hi23 = _mm512_unpackhi_ps((__m512)x2, (__m512)x3);
  const __m512d a = _mm512_unpacklo_pd((__m512d)lo01, (__m512d)lo23);  // counters 0 4 8 12
  const __m512d b = _mm512_unpackhi_pd((__m512d)lo01, (__m512d)lo23);  // counters 1 5 9 13
  const __m512d c = _mm512_unpacklo_pd((__m512d)hi01, (__m512d)hi23);  // counters 2 6 10 14
  const __m512d d = _mm512_unpackhi_pd((__m512d)hi01, (__m512d)hi23);  // counters 3 7 11 15
  const __m512d ab_lo = _mm512_shuffle_f64x2(a, b, 0x44), ab_hi = _mm512_shuffle_f64x2(a, b, 0xee);
  const __m512d cd_lo = _mm512_shuffle_f64x2(c, d, 0x44), cd_hi = _mm512_shuffle_f64x2(c, d, 0xee);
  _mm512_storeu_pd((double*)out, _mm512_shuffle_f64x2(ab_lo, cd_lo, 0x88));
  _mm512_storeu_pd((double*)(out + 16), _mm512_shuffle_f64x2(ab_lo, cd_lo, 0xdd));
  _mm512_storeu_pd((double*)(out + 32), _mm512_shuffle_f64x2(ab_hi, cd_hi, 0x88));
  _mm512_storeu_pd((double*)(out + 48), _mm512_shuffle_f64x2(ab_hi, cd_hi, 0xdd));
#elif defined(__AVX2__)
  const __m256 lo01 = _mm256_unpacklo_ps((__m256)x0, (__m256)x1);
  const __m256 hi01 = _mm256_unpackhi_ps((__m256)x0, (__m256)x1);
  const __m256 lo23 = _mm256_unpacklo_ps((__m256)x2, (__m256)x3);
  const __m256 hi23 = _mm256_unpackhi_ps((__m256)x2, (__m256)x3);
  const __m256 a = (__m256)_mm256_unpacklo_pd((__m256d)lo01, (__m256d)lo23);  // counters 0 4
  const __m256 b = (__m256)_mm256_unpackhi_pd((__m256d)lo01, (__m256d)lo23);  // counters 1 5
  const __m256 c = (__m256)_mm256_unpacklo_pd((__m256d)hi01, (__m256d)hi23);  // counters 2 6
  const __m256 d = (__m256)_mm256_unpackhi_pd((__m256d)hi01, (__m256d)hi23);  // counters 3 7
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(a, b, 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(c, d, 0x20));
  _mm256_storeu_ps(out + 16, _mm256_permute2f128_ps(a, b, 0x31));
  _mm256_storeu_ps(out + 24, _mm256_permute2f128_ps(c, d, 0x31));
#else
  for (int i = 0; i < kLanes; ++i) {
    out[4 * i] = x0[i];
    out[4 * i + 1] = x1[i];
    out[4 * i + 2] = x2[i];
    out[4 * i + 3] = x3[i];
  }
#endif
}

// Four adjacent columns of kLanes rows: x[j][i] = p[i stride + j], and back.
static inline void load_columns4(const float* p, int64_t stride, vf x[4]) {
#if defined(__AVX512F__)
  __m512 r[4];  // quarter q of r[j]: row 4 q + j
  for (int j = 0; j < 4; ++j) {
    const float* row = p + j * stride;
    r[j] = _mm512_castps128_ps512(_mm_loadu_ps(row));
    r[j] = _mm512_insertf32x4(r[j], _mm_loadu_ps(row + 4 * stride), 1);
    r[j] = _mm512_insertf32x4(r[j], _mm_loadu_ps(row + 8 * stride), 2);
    r[j] = _mm512_insertf32x4(r[j], _mm_loadu_ps(row + 12 * stride), 3);
  }
  const __m512d a = (__m512d)_mm512_unpacklo_ps(r[0], r[1]);
  const __m512d b = (__m512d)_mm512_unpacklo_ps(r[2], r[3]);
  const __m512d c = (__m512d)_mm512_unpackhi_ps(r[0], r[1]);
  const __m512d d = (__m512d)_mm512_unpackhi_ps(r[2], r[3]);
  x[0] = (vf)_mm512_unpacklo_pd(a, b);
  x[1] = (vf)_mm512_unpackhi_pd(a, b);
  x[2] = (vf)_mm512_unpacklo_pd(c, d);
  x[3] = (vf)_mm512_unpackhi_pd(c, d);
#elif defined(__AVX2__)
  __m256 r[4];  // half q of r[j]: row 4 q + j
  for (int j = 0; j < 4; ++j) {
    const float* row = p + j * stride;
    r[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)),
                                _mm_loadu_ps(row + 4 * stride), 1);
  }
  const __m256d a = (__m256d)_mm256_unpacklo_ps(r[0], r[1]);
  const __m256d b = (__m256d)_mm256_unpacklo_ps(r[2], r[3]);
  const __m256d c = (__m256d)_mm256_unpackhi_ps(r[0], r[1]);
  const __m256d d = (__m256d)_mm256_unpackhi_ps(r[2], r[3]);
  x[0] = (vf)_mm256_unpacklo_pd(a, b);
  x[1] = (vf)_mm256_unpackhi_pd(a, b);
  x[2] = (vf)_mm256_unpacklo_pd(c, d);
  x[3] = (vf)_mm256_unpackhi_pd(c, d);
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) x[j][i] = p[i * stride + j];
#endif
}
static inline void store_columns4(float* p, int64_t stride, vf x0, vf x1, vf x2, vf x3) {
#if defined(__AVX512F__)
  const __m512d a = (__m512d)_mm512_unpacklo_ps((__m512)x0, (__m512)x1);
  const __m512d b = (__m512d)_mm512_unpacklo_ps((__m512)x2, (__m512)x3);
  const __m512d c = (__m512d)_mm512_unpackhi_ps((__m512)x0, (__m512)x1);
  const __m512d d = (__m512d)_mm512_unpackhi_ps((__m512)x2, (__m512)x3);
  const __m512 r[4] = {(__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b),
                       (__m512)_mm512_unpacklo_pd(c, d), (__m512)_mm512_unpackhi_pd(c, d)};
  for (int j = 0; j < 4; ++j) {
    float* row = p + j * stride;
    _mm_storeu_ps(row, _mm512_castps512_ps128(r[j]));
    _mm_storeu_ps(row + 4 * stride, _mm512_extractf32x4_ps(r[j], 1));
    _mm_storeu_ps(row + 8 * stride, _mm512_extractf32x4_ps(r[j], 2));
    _mm_storeu_ps(row + 12 * stride, _mm512_extractf32x4_ps(r[j], 3));
  }
#elif defined(__AVX2__)
  const __m256d a = (__m256d)_mm256_unpacklo_ps((__m256)x0, (__m256)x1);
  const __m256d b = (__m256d)_mm256_unpacklo_ps((__m256)x2, (__m256)x3);
  const __m256d c = (__m256d)_mm256_unpackhi_ps((__m256)x0, (__m256)x1);
  const __m256d d = (__m256d)_mm256_unpackhi_ps((__m256)x2, (__m256)x3);
  const __m256 r[4] = {(__m256)_mm256_unpacklo_pd(a, b), (__m256)_mm256_unpackhi_pd(a, b),
                       (__m256)_mm256_unpacklo_pd(c, d), (__m256)_mm256_unpackhi_pd(c, d)};
  for (int j = 0; j < 4; ++j) {
    _mm_storeu_ps(p + j * stride, _mm256_castps256_ps128(r[j]));
    _mm_storeu_ps(p + (j + 4) * stride, _mm256_extractf128_ps(r[j], 1));
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    float* row = p + i * stride;
    row[0] = x0[i], row[1] = x1[i], row[2] = x2[i], row[3] = x3[i];
  }
#endif
}

}  // namespace GM_ISA
}  // namespace gm
