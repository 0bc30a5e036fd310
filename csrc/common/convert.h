// bfloat16 and float16 to float32 and back, round to nearest even, NaN kept.
#pragma once

#include "common/simd.h"

namespace gm {
namespace GM_ISA {

using vu16 = vec_of<uint16_t, kLanes>::type;

static inline float from_bf16(uint16_t h) { return from_bits((int32_t)((uint32_t)h << 16)); }
static inline vf from_bf16(vu16 h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

static inline uint16_t to_bf16(float x) {
  const uint32_t u = (uint32_t)bits(x);
  return x != x ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline vu16 to_bf16(vf x) {
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return __builtin_convertvector((vu)(x != x ? (vi)(u >> 16 | 0x40) : (vi)rounded), vu16);
}

static inline float from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float x;
  if (magnitude >= 0x7c00) {
    x = from_bits((int32_t)(0x7f800000u | (magnitude & 0x3ff) << 13));
  } else if (magnitude < 0x400) {
    x = (float)magnitude * 0x1p-24f;
  } else {
    x = from_bits((int32_t)((magnitude << 13) + (112u << 23)));
  }
  return from_bits((int32_t)((uint32_t)bits(x) | sign));
}
static inline uint16_t to_f16(float x) {
  const uint32_t u = (uint32_t)bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    h = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum with 1/2 rounds at 2^-24
    h = (uint32_t)bits(from_bits((int32_t)magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  }
  return (uint16_t)(h | sign);
}

static inline vf from_f16(vu16 h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = from_f16((uint16_t)h[i]);
  return x;
#endif
}
static inline vu16 to_f16(vf x) {
#if defined(__AVX512F__)
  return (vu16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (vu16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  vu16 h;
  for (int i = 0; i < kLanes; ++i) h[i] = to_f16((float)x[i]);
  return h;
#endif
}

}  // namespace GM_ISA
}  // namespace gm
