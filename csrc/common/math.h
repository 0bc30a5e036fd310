// Elementary functions in float32, for scalars and vectors alike, and on the GPU as scalars.
//
// Two kinds live here. The noise functions (ln_uniform, sincos_turns, normal_pair) are made of +,
// -, *, bit operations and IEEE sqrt in a fixed order, so that every backend agrees to the last
// bit. The others may use fma() and are merely accurate. Coefficients come from fit_polynomials.py.
#pragma once

#include "common/dtype.h"
#if defined(__CUDACC__)
#include "common/scalar.cuh"
#else
#include "common/simd.h"
#endif

namespace gm {
namespace GM_ISA {

// uint32 words to (0, 1]: float32(x) 2^-32 + 2^-33. The product is exact, so a fused form, here and
// wherever the noise says fma(), has the same bits as the plain one.
template <class F>
GM_HD F uniform_from(F word_as_float) {
  return fma(word_as_float, splat<F>(0x1p-32f), splat<F>(0x1p-33f));
}

// A function, since CUDA cannot index a constant array of the namespace.
GM_HD constexpr float log1p_coefficient(int i) {
  constexpr float c[8] = {-0.07666336745023727f, 0.12789621949195862f,  -0.1316087394952774f,
                          0.1419726312160492f,   -0.16622772812843323f, 0.20001448690891266f,
                          -0.2500084638595581f,  0.333333283662796f};
  return c[i];
}
constexpr float kLn2High = 0.693145751953125f;  // 15 bits: e * kLn2High is exact
constexpr float kLn2Low = 1.42860676533018518e-06f;

// The same polynomial for the noise, shorter; and ln 2's low part in 18 bits: k times it is exact.
GM_HD constexpr float ln_coefficient(int i) {
  constexpr float kCoefficients[6] = {-0.10470021516084671f, 0.16173018515110016f,
                                      -0.17108885943889618f, 0.19904570281505585f,
                                      -0.24983768165111542f, 0.3333487808704376f};
  return kCoefficients[i];
}
constexpr float kLn2LowNoise = 1.428605173714459e-06f;

// x = 2^e (1 + f) of a positive normal x; k = 2^23 e as an integer.
template <class F>
GM_HD void binary_parts(F x, int_of<F>& k, F& f) {
  k = (bits(x) - 0x3f3504f3) & -0x800000;
  f = from_bits(bits(x) - k) - 1.0f;
}

// -2 ln of 2^e (1 + f). Fixed order, nothing rounded that the reference does not round.
template <class F>
[[gnu::always_inline]] GM_HD F minus_two_ln(int_of<F> exponent, F f) {
  const F k = to_float(exponent);
  F p = f * (-2.0f * ln_coefficient(0)) + -2.0f * ln_coefficient(1);
  for (int i = 2; i < 6; ++i) p = p * f + -2.0f * ln_coefficient(i);
  const F tail = fma(k, splat<F>(-2.0f * kLn2LowNoise * 0x1p-23f), f * f * (p * f + 1.0f));
  return fma(k, splat<F>(-2.0f * kLn2High * 0x1p-23f), fma(f, splat<F>(-2.0f), tail));
}

template <class F>
[[gnu::always_inline]] GM_HD F minus_two_ln(F x) {
  int_of<F> k;
  F f;
  binary_parts(x, k, f);
  return minus_two_ln(k, f);
}

// cos and sin of 2 pi w 2^-32; 4 w 2^-32 = k + f, |f| <= 1/2, k from the word's own bits. Fixed
// order, no contraction.
template <class F, class U>
[[gnu::always_inline]] GM_HD void sincos_turns(U word, F& sine, F& cosine) {
  using I = int_of<F>;
  const F f = to_float((I)(word << 2)) * 0x1p-32f;
  const F f2 = f * f;
  F s = f2 * -0.004630818497389555f + 0.07969274371862411f;
  s = s * f2 + -0.645965039730072f;
  s = s * f2 + 1.5707963705062866f;
  s = s * f;
  F c = f2 * -0.020424289628863335f + 0.2536056339740753f;
  c = c * f2 + -1.2336978912353516f;
  c = c * f2 + 1.0f;
  // Bit 30 of k 2^30: an odd quarter swaps. Bit 31: the sign.
  const U quarter = word + 0x20000000u;
  const I swap = (I)(quarter << 1) >> 31;
  const I first = (bits(c) & ~swap) | (bits(s) & swap);
  const I second = (bits(s) & ~swap) | (bits(c) & swap);
  cosine = from_bits(first ^ (I)((quarter + 0x40000000u) & 0x80000000u));
  sine = from_bits(second ^ (I)(quarter & 0x80000000u));
}

// Two words to two standard normals (Box and Muller 1958): the radius by the first, and both.
template <class F, class U>
[[gnu::always_inline]] GM_HD F normal_radius(U word0) {
  return sqrt_ieee(minus_two_ln(uniform_from(to_float(word0))));
}
template <class F, class U>
[[gnu::always_inline]] GM_HD void normals_at(F radius, U word1, F& n0, F& n1) {
  F s, c;
  sincos_turns(word1, s, c);
  n0 = radius * c;
  n1 = radius * s;
}
template <class F, class U>
GM_HD void normal_pair(U word0, U word1, F& n0, F& n1) {
  normals_at(normal_radius<F>(word0), word1, n0, n1);
}

// log1p(f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]
template <class F>
GM_HD F log1p_polynomial(F f) {
  F p = splat<F>(log1p_coefficient(0));
  for (int i = 1; i < 8; ++i) p = fma(p, f, splat<F>(log1p_coefficient(i)));
  return p;
}

// exp(x) = 2^n (1 + tail) with tail = expm1 of the reduced argument; n is 0 for |x| < ln(2) / 2.
template <class F>
struct ExpParts {
  F tail;    // r + r^2 q(r)
  F excess;  // r^2 q(r), which is exp(r) - 1 - r without cancellation
  F n;       // an integer
};

// x = n ln 2 + r, |r| <= ln(2) / 2.
template <class F>
struct Reduced {
  F r, n;
};

template <class F>
GM_HD Reduced<F> reduce(F x) {
  x = max_keeping_nan(min_keeping_nan(x, 89.0f), -110.0f);
  const F n = round_to_integer(x * 1.44269504088896341f);
  return {fma(n, splat<F>(-kLn2Low), fma(n, splat<F>(-kLn2High), x)), n};
}

// q(r) of exp(r) = 1 + r + r^2 q(r)
template <class F>
GM_HD F exp_polynomial(F r) {
  F q = fma(r, splat<F>(0.001393575919792056f), splat<F>(0.008369090966880322f));
  q = fma(q, r, splat<F>(0.04166645556688309f));
  q = fma(q, r, splat<F>(0.16666516661643982f));
  return fma(q, r, splat<F>(0.5f));
}

template <class F>
GM_HD ExpParts<F> exp_parts(F x) {
  const Reduced<F> a = reduce(x);
  const F excess = a.r * a.r * exp_polynomial(a.r);
  return {a.r + excess, excess, a.n};
}

// exp(x); +inf above 88.73, 0 below -104, NaN of NaN.
template <class F>
GM_HD F exp(F x) {
  const Reduced<F> a = reduce(x);
  return scale_by_power(fma(fma(exp_polynomial(a.r), a.r, splat<F>(1.0f)), a.r, splat<F>(1.0f)),
                        a.n);
}

// 2^x for x <= 0 to 2 ulp: exactly 0 far down where scalef() is at hand, else at least 2^-125. NaN
// of NaN.
template <class F>
GM_HD F exp2_nonpositive(F x) {
#if !defined(__AVX512F__)
  x = max_keeping_nan(x, -125.0f);
#endif
  const F n = round_to_integer(x), r = x - n;
  F p = fma(r, splat<F>(0.0013391643296927214f), splat<F>(0.009672200307250023f));
  p = fma(p, r, splat<F>(0.05550358071923256f));
  p = fma(p, r, splat<F>(0.2402222752571106f));
  p = fma(p, r, splat<F>(0.6931471824645996f));
  p = fma(p, r, splat<F>(1.0f));
#if defined(__AVX512F__)
  return scale_by_power(p, n);
#else
  return from_bits(bits(p) + to_int(n) * 0x800000);
#endif
}

// exp(x) and exp(x) - 1 - x, the latter to full relative accuracy near 0, from one polynomial.
template <class F>
GM_HD void exp_and_excess(F x, F& value, F& excess) {
  const ExpParts<F> e = exp_parts(x);
  value = scale_by_power(1.0f + e.tail, e.n);
  excess = select(e.n == 0.0f, e.excess, value - (1.0f + x));
}

// log1p(t) for t in [0, 1].
template <class F>
GM_HD F log1p_unit(F t) {
  const auto upper = t > 0.41421356f;
  const F f = select(upper, fma(t, splat<F>(0.5f), splat<F>(-0.5f)), t);
  const F tail = f * f * fma(log1p_polynomial(f), f, splat<F>(-0.5f));
  return select(upper, (f + (tail + kLn2Low)) + kLn2High, f + tail);
}

// ln x for finite x > 0, subnormals included; -inf at 0, +inf at +inf, NaN below 0.
template <class F>
GM_HD F log(F x) {
  const auto tiny = x < 0x1p-126f;
  const F scaled = select(tiny, x * 0x1p25f, x);
  const F shift = select(tiny, splat<F>(-25.0f), splat<F>(0.0f));
  const int_of<F> e = (bits(scaled) - 0x3f3504f3) >> 23;
  const F f = from_bits(bits(scaled) - e * 0x800000) - 1.0f;
  const F k = to_float(e) + shift;
  const F tail = fma(k, splat<F>(kLn2Low), f * f * fma(log1p_polynomial(f), f, splat<F>(-0.5f)));
  F y = fma(k, splat<F>(kLn2High), f + tail);
  y = select(x == 0.0f, splat<F>(-__builtin_inff()), y);
  y = select(x > 3.4028235e38f, x, y);
  return select(x < 0.0f, splat<F>(__builtin_nanf("")), select(x != x, x, y));
}

#if defined(__AVX512F__)
// tanh x = m / (2 - m), m = -expm1(-2 |x|), to 3.1 ulp; -2 |x| = (n + r) ln 2. One form for all x:
// relative accuracy near 0 is that of m. 4.6 ns a vector where the form below takes 6.7.
template <class F>
GM_HD F tanh(F x) {
  const int_of<F> sign = bits(x) & (int32_t)0x80000000;
  const F y =
      max_keeping_nan(from_bits(bits(x) | (int32_t)0x80000000) * 2.88539008177792681f, -40.0f);
  const F n = round_to_integer(y), r = y - n;
  F p = fma(r, splat<F>(0.00015453876403626055f), splat<F>(0.0013388069346547127f));
  p = fma(p, r, splat<F>(0.009618083015084267f));
  p = fma(p, r, splat<F>(0.05550365895032883f));
  p = fma(p, r, splat<F>(0.24022650718688965f));
  p = fma(p, r, splat<F>(0.6931471824645996f));
  const F power = scale_by_power(splat<F>(1.0f), n);
  const F m = fma(power, p * -r, 1.0f - power);
  return from_bits(bits(quotient(m, 2.0f - m)) | sign);
}
#else
// tanh x = x + x^3 P(x^2) for |x| < 0.6
template <class F>
GM_HD F tanh_near(F x) {
  const F s = x * x;
  F p = fma(s, splat<F>(-0.0058998968452215195f), splat<F>(0.020800143480300903f));
  p = fma(p, s, splat<F>(-0.05378509685397148f));
  p = fma(p, s, splat<F>(0.13331939280033112f));
  p = fma(p, s, splat<F>(-0.33333298563957214f));
  return fma(p * s, x, x);
}

// tanh x to 2.2 ulp, 0.5 on average at worst: beyond 0.6 1 - 2 e / (1 + e), e = exp(-2 |x|).
template <class F>
GM_HD F tanh(F x) {
  const int_of<F> sign = bits(x) & (int32_t)0x80000000;
  const F a = from_bits(bits(x) ^ sign);
  const F e = exp2_nonpositive(a * -2.88539008177792681f);
  const F far = fma(quotient(e, 1.0f + e), splat<F>(-2.0f), splat<F>(1.0f));
  return select(a < 0.6f, tanh_near(x), from_bits(bits(far) | sign));
}
#endif

// a x + b y
template <class F>
GM_HD F mix(float a, F x, float b, F y) {
  return fma(splat<F>(b), y, x * a);
}

}  // namespace GM_ISA
}  // namespace gm
