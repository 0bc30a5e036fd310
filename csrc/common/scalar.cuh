// What simd.h is to CPU vectors, for one CUDA thread: the primitives under math.h on float.
#pragma once

#include <cstring>

#include "common/dtype.h"

namespace gm {
namespace device {

template <class F>
struct traits;
template <>
struct traits<float> {
  using I = int32_t;
};
template <class F>
using int_of = typename traits<F>::I;

GM_HD int32_t bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  int32_t i;
  memcpy(&i, &x, 4);
  return i;
#endif
}
GM_HD float from_bits(int32_t i) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(i);
#else
  float x;
  memcpy(&x, &i, 4);
  return x;
#endif
}
GM_HD int32_t to_int(float x) { return (int32_t)x; }
GM_HD float to_float(uint32_t i) { return (float)i; }
GM_HD float to_float(int32_t i) { return (float)i; }
template <class F>
GM_HD F splat(float x) {
  return x;
}
GM_HD float select(bool mask, float a, float b) { return mask ? a : b; }

// Correctly rounded square root of +-0 and of [2^-100, max]; NaN of NaN. The five steps are those
// of __fsqrt_rn where it takes no branch: 0 needs no slow path as long as its inverse root is
// finite.
GM_HD float sqrt_ieee(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaxf(x, 0x1p-100f)));
  const float root = x * y;
  return __fmaf_rn(__fmaf_rn(-root, root, x), y * 0.5f, root);
#else
  return __builtin_sqrtf(x);
#endif
}

// The smaller and the larger of x and a bound; NaN stays.
GM_HD float min_keeping_nan(float x, float bound) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
#else
  return x > bound ? bound : x;
#endif
}
GM_HD float max_keeping_nan(float x, float bound) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
#else
  return x < bound ? bound : x;
#endif
}

// Round to nearest even for |x| < 2^22: adding 1.5 2^23 leaves no room for a fraction.
GM_HD float round_to_integer(float x) { return (x + 12582912.0f) - 12582912.0f; }

// x 2^n for an integer n from -160 to 130, in two steps so that results below the normal range
// round once. The low bits of n + 1.5 2^23 are those of n: what stands above them, the shifts drop.
GM_HD float scale_by_power(float x, float n) {
  const int32_t k = bits(n + 12582912.0f), half = k >> 1;
  return x * from_bits((half << 23) + 0x3f800000) * from_bits(((k - half) << 23) + 0x3f800000);
}
GM_HD float quotient(float a, float b) { return a / b; }
GM_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace device
}  // namespace gm
