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

// uint32 words to (0, 1]: float32(x) 2^-32 + 2^-33, the one rounding at the sum.
template <class F>
GM_HD F uniform_from(F word_as_float) {
  return word_as_float * 0x1p-32f + 0x1p-33f;
}

// log1p(f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]
template <class F>
GM_HD F log1p_polynomial(F f) {
  F p = f * -0.07666336745023727f + 0.12789621949195862f;
  p = p * f + -0.1316087394952774f;
  p = p * f + 0.1419726312160492f;
  p = p * f + -0.16622772812843323f;
  p = p * f + 0.20001448690891266f;
  p = p * f + -0.2500084638595581f;
  p = p * f + 0.333333283662796f;
  return p;
}

constexpr float kLn2High = 0.693145751953125f;  // 16 bits: e * kLn2High is exact
constexpr float kLn2Low = 1.42860676533018518e-06f;

// ln u for u in (0, 1], u normal. Fixed order, no contraction. u = 2^e (1 + f).
template <class F>
GM_HD F ln_uniform(F u) {
  using I = int_of<F>;
  const I e = (bits(u) - 0x3f3504f3) >> 23;
  const F f = from_bits(bits(u) - e * 0x800000) - 1.0f;
  const F k = to_float(e);
  const F p = log1p_polynomial(f);
  const F tail = k * kLn2Low + f * f * (p * f - 0.5f);
  return (f + tail) + k * kLn2High;
}

// cos and sin of 2 pi u for u in (0, 1]. 4 u = k + f, |f| <= 1/2. Fixed order, no contraction.
template <class F>
GM_HD void sincos_turns(F u, F& sine, F& cosine) {
  using I = int_of<F>;
  const F turns = u * 4.0f;
  const I k = to_int(turns + 0.5f);
  const F f = turns - to_float(k);
  const F f2 = f * f;
  F s = f2 * -0.004630818497389555f + 0.07969274371862411f;
  s = s * f2 + -0.645965039730072f;
  s = s * f2 + 1.5707963705062866f;
  s = s * f;
  F c = f2 * 0.000896678538993001f + -0.020856503397226334f;
  c = c * f2 + 0.2536686360836029f;
  c = c * f2 + -1.2337005138397217f;
  c = c * f2 + 1.0f;
  // Quarter turns: odd k swaps, then the signs of the four quadrants.
  const I swap = -(k & 1);
  const I first = (bits(c) & ~swap) | (bits(s) & swap);
  const I second = (bits(s) & ~swap) | (bits(c) & swap);
  cosine = from_bits(first ^ (((k + 1) & 2) << 30));
  sine = from_bits(second ^ ((k & 2) << 30));
}

// Two uniforms to two standard normals (Box and Muller 1958).
template <class F>
GM_HD void normal_pair(F u0, F u1, F& n0, F& n1) {
  const F r = sqrt_ieee(ln_uniform(u0) * -2.0f);
  F s, c;
  sincos_turns(u1, s, c);
  n0 = r * c;
  n1 = r * s;
}

// exp(x) = 2^k (1 + tail) with tail = expm1 of the reduced argument; k is 0 for |x| <= ln(2)/2.
template <class F>
struct ExpParts {
  F tail;    // r + r^2 q(r)
  F excess;  // r^2 q(r), which is exp(r) - 1 - r without cancellation
  int_of<F> k;
};

template <class F>
GM_HD ExpParts<F> exp_parts(F x) {
  x = select(x > 89.0f, splat<F>(89.0f), x);
  x = select(x < -110.0f, splat<F>(-110.0f), x);
  const F t = x * 1.44269504088896341f;
  const int_of<F> k = to_int(t + select(t < 0.0f, splat<F>(-0.5f), splat<F>(0.5f)));
  const F n = to_float(k);
  F r = fma(n, splat<F>(-kLn2High), x);
  r = fma(n, splat<F>(-kLn2Low), r);
  F q = fma(r, splat<F>(0.001393575919792056f), splat<F>(0.008369090966880322f));
  q = fma(q, r, splat<F>(0.04166645556688309f));
  q = fma(q, r, splat<F>(0.16666516661643982f));
  q = fma(q, r, splat<F>(0.5f));
  const F excess = r * r * q;
  return {r + excess, excess, k};
}

// x 2^k for k from -160 to 130, in two steps so that results below the normal range round once.
template <class F>
GM_HD F scale_by_power(F x, int_of<F> k) {
  const int_of<F> half = k >> 1;
  return x * from_bits((half + 127) << 23) * from_bits((k - half + 127) << 23);
}

// exp(x); +inf above 88.73, 0 below -104, NaN of NaN.
template <class F>
GM_HD F exp(F x) {
  const ExpParts<F> e = exp_parts(x);
  return scale_by_power(1.0f + e.tail, e.k);
}

// exp(x) and exp(x) - 1 - x, the latter to full relative accuracy near 0, from one polynomial.
template <class F>
GM_HD void exp_and_excess(F x, F& value, F& excess) {
  const ExpParts<F> e = exp_parts(x);
  value = scale_by_power(1.0f + e.tail, e.k);
  excess = select(to_float(e.k) == 0.0f, e.excess, value - (1.0f + x));
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

}  // namespace GM_ISA
}  // namespace gm
