// Rows of any float dtype on the GPU: groups of neighbouring values come as float32 and leave rounded,
// 16 bytes an access where the row allows it, value by value where it does not.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace gm {
namespace device {

// A dtype known only by its tag: operands of one call may differ.
struct Any {};

// Columns of a group: 16 bytes of the dtype, a whole number of noise counters.
template <class T>
constexpr int kWidth = 16 / (int)sizeof(T);
template <>
constexpr int kWidth<Any> = 4;

static __device__ __forceinline__ float widen(float x) { return x; }
static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }

static __device__ __forceinline__ void narrow(float x, float& y) { y = x; }
static __device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
static __device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }

// Two values of 16 bits in one word, lower address first.
static __device__ __forceinline__ void widen_pair(uint32_t word, float* x, __nv_bfloat16) {
  x[0] = __uint_as_float(word << 16);
  x[1] = __uint_as_float(word & 0xffff0000u);
}
static __device__ __forceinline__ void widen_pair(uint32_t word, float* x, __half) {
  __half2 pair;
  memcpy(&pair, &word, 4);
  const float2 wide = __half22float2(pair);
  x[0] = wide.x;
  x[1] = wide.y;
}
static __device__ __forceinline__ uint32_t narrow_pair(const float* x, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
static __device__ __forceinline__ uint32_t narrow_pair(const float* x, __half) {
  const __half2 pair = __floats2half2_rn(x[0], x[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// N values in one access of N * sizeof(T) bytes, 8 or 16.
template <int N>
static __device__ __forceinline__ void load_vector(const float* p, float (&x)[N]) {
  static_assert(N == 4, "16 bytes");
  const float4 v = *(const float4*)p;
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
template <class H, int N>
static __device__ __forceinline__ void load_vector(const H* p, float (&x)[N]) {
  static_assert(N == 4 || N == 8, "8 or 16 bytes");
  if constexpr (N == 8) {
    const uint4 v = *(const uint4*)p;
    widen_pair(v.x, x, H{}), widen_pair(v.y, x + 2, H{});
    widen_pair(v.z, x + 4, H{}), widen_pair(v.w, x + 6, H{});
  } else {
    const uint2 v = *(const uint2*)p;
    widen_pair(v.x, x, H{}), widen_pair(v.y, x + 2, H{});
  }
}
template <int N>
static __device__ __forceinline__ void store_vector(float* p, const float (&x)[N]) {
  static_assert(N == 4, "16 bytes");
  *(float4*)p = make_float4(x[0], x[1], x[2], x[3]);
}
template <class H, int N>
static __device__ __forceinline__ void store_vector(H* p, const float (&x)[N]) {
  static_assert(N == 4 || N == 8, "8 or 16 bytes");
  if constexpr (N == 8) {
    *(uint4*)p = make_uint4(narrow_pair(x, H{}), narrow_pair(x + 2, H{}), narrow_pair(x + 4, H{}),
                            narrow_pair(x + 6, H{}));
  } else {
    *(uint2*)p = make_uint2(narrow_pair(x, H{}), narrow_pair(x + 2, H{}));
  }
}

// The group of N at p, of which `count` values exist; the others are 0.
template <bool kVector, class T, int N>
static __device__ __forceinline__ void load_group(const T* p, int count, float (&x)[N]) {
  if constexpr (kVector) {
    load_vector(p, x);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = i < count ? widen(p[i]) : 0.0f;
  }
}
template <bool kVector, class T, int N>
static __device__ __forceinline__ void store_group(T* p, int count, const float (&x)[N]) {
  if constexpr (kVector) {
    store_vector(p, x);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) narrow(x[i], p[i]);
  }
}

// One row chunk of an operand: load<kVector>(d, count, x) reads the group at column d of the chunk.
// An absent operand reads as 0.
template <class T>
struct RowIn {
  const T* p;

  __device__ RowIn(const Operand& x, int64_t row, int64_t start)
      : p(x.data ? (const T*)x.data + row * x.row_stride + start : nullptr) {}
  template <bool kVector, int N>
  __device__ __forceinline__ void load(int d, int count, float (&x)[N]) const {
    load_group<kVector>(p + d, count, x);
  }
};

// The same for a dtype known by its tag, and for a stride of 0 within the row.
template <>
struct RowIn<Any> {
  const Operand& x;
  int64_t at;

  __device__ RowIn(const Operand& x, int64_t row, int64_t start)
      : x(x), at(row * x.row_stride + start * x.stride) {}
  template <bool kVector, int N>
  __device__ __forceinline__ void load(int d, int count, float (&out)[N]) const {
    const int64_t i = at + d;
    switch (x.dtype) {
      case DType::bf16: return load_group<kVector>((const __nv_bfloat16*)x.data + i, count, out);
      case DType::f16: return load_group<kVector>((const __half*)x.data + i, count, out);
      default: return load_group<kVector>((const float*)x.data + i, count, out);
    }
  }
};
