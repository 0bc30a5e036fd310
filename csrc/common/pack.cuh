// Rows of any float dtype on the GPU: groups of neighbouring values come as float32 and leave
// rounded, 16 bytes an access where the row allows it, value by value where it does not.
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
static __device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) {
  y = __float2bfloat16_rn(x);
}
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

// Group g of a row of vectors: N values in one access of 8 or 16 bytes.
template <int N>
static __device__ __forceinline__ void load_vector(const float* row, int g, float (&x)[N]) {
  static_assert(N == 4, "16 bytes");
  const float4 v = ((const float4*)row)[g];
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
template <class H, int N>
static __device__ __forceinline__ void load_vector(const H* row, int g, float (&x)[N]) {
  static_assert(N == 4 || N == 8, "8 or 16 bytes");
  if constexpr (N == 8) {
    const uint4 v = ((const uint4*)row)[g];
    widen_pair(v.x, x, H{}), widen_pair(v.y, x + 2, H{});
    widen_pair(v.z, x + 4, H{}), widen_pair(v.w, x + 6, H{});
  } else {
    const uint2 v = ((const uint2*)row)[g];
    widen_pair(v.x, x, H{}), widen_pair(v.y, x + 2, H{});
  }
}
template <int N>
static __device__ __forceinline__ void store_vector(float* row, int g, const float (&x)[N]) {
  static_assert(N == 4, "16 bytes");
  ((float4*)row)[g] = make_float4(x[0], x[1], x[2], x[3]);
}
template <class H, int N>
static __device__ __forceinline__ void store_vector(H* row, int g, const float (&x)[N]) {
  static_assert(N == 4 || N == 8, "8 or 16 bytes");
  if constexpr (N == 8) {
    ((uint4*)row)[g] = make_uint4(narrow_pair(x, H{}), narrow_pair(x + 2, H{}),
                                  narrow_pair(x + 4, H{}), narrow_pair(x + 6, H{}));
  } else {
    ((uint2*)row)[g] = make_uint2(narrow_pair(x, H{}), narrow_pair(x + 2, H{}));
  }
}

// Group g of a row, N columns, of which `count` exist; the others read as 0.
template <bool kVector, class T, int N>
static __device__ __forceinline__ void load_group(const T* row, int g, int count, float (&x)[N]) {
  if constexpr (kVector) {
    load_vector(row, g, x);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = i < count ? widen(row[g * N + i]) : 0.0f;
  }
}
template <bool kVector, class T, int N>
static __device__ __forceinline__ void store_group(T* row, int g, int count, const float (&x)[N]) {
  if constexpr (kVector) {
    store_vector(row, g, x);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) narrow(x[i], row[g * N + i]);
  }
}

// One row chunk of an operand.
template <class T>
struct RowIn {
  const T* row;

  __device__ __forceinline__ RowIn(const Operand& x, int64_t b, int64_t start)
      : row((const T*)x.data + b * x.row_stride + start) {}
  template <bool kVector, int N>
  __device__ __forceinline__ void load(int g, int count, float (&x)[N]) const {
    load_group<kVector>(row, g, count, x);
  }
};
template <>
struct RowIn<Any> {
  const void* data;
  int64_t at;
  DType dtype;

  __device__ __forceinline__ RowIn(const Operand& x, int64_t b, int64_t start)
      : data(x.data), at(b * x.row_stride + start), dtype(x.dtype) {}
  template <bool kVector, int N>
  __device__ __forceinline__ void load(int g, int count, float (&x)[N]) const {
    if (dtype == DType::f32) return load_group<kVector>((const float*)data + at, g, count, x);
    if (dtype == DType::f16) return load_group<kVector>((const __half*)data + at, g, count, x);
    load_group<kVector>((const __nv_bfloat16*)data + at, g, count, x);
  }
};

// One row chunk of a result.
template <class T>
struct RowOut {
  T* row;

  __device__ __forceinline__ RowOut(const Result& y, int64_t b, int64_t start)
      : row((T*)y.data + b * y.row_stride + start) {}
  template <bool kVector, int N>
  __device__ __forceinline__ void store(int g, int count, const float (&x)[N]) const {
    store_group<kVector>(row, g, count, x);
  }
};
template <>
struct RowOut<Any> {
  void* data;
  int64_t at;
  DType dtype;

  __device__ __forceinline__ RowOut(const Result& y, int64_t b, int64_t start)
      : data(y.data), at(b * y.row_stride + start), dtype(y.dtype) {}
  template <bool kVector, int N>
  __device__ __forceinline__ void store(int g, int count, const float (&x)[N]) const {
    if (dtype == DType::f32) return store_group<kVector>((float*)data + at, g, count, x);
    if (dtype == DType::f16) return store_group<kVector>((__half*)data + at, g, count, x);
    store_group<kVector>((__nv_bfloat16*)data + at, g, count, x);
  }
};

// One value by its tag.
static __device__ __forceinline__ float read_value(const Operand& x, int64_t i) {
  if (x.dtype == DType::f32) return ((const float*)x.data)[i];
  if (x.dtype == DType::f16) return widen(((const __half*)x.data)[i]);
  return widen(((const __nv_bfloat16*)x.data)[i]);
}

}  // namespace device
}  // namespace gm
