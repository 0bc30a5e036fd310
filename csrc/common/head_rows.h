// Rows of heads in the kernels of attention: scratch memory, and rows of any dtype as float32.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "common/block.h"
#include "common/heads.h"

namespace gm {
namespace GM_ISA {

struct FreeScratch {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], FreeScratch>;

// Uninitialised words on a cache line.
template <class T>
static Scratch<T> scratch(int64_t count) {
  const size_t bytes = ((size_t)count * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  return Scratch<T>((T*)p);
}

static inline const char* row_at(const Heads& x, int64_t b, int64_t h, int64_t t) {
  return (const char*)x.data +
         (b * x.batch + h * x.head + t * x.row) * (x.dtype == DType::f32 ? 4 : 2);
}

template <class F>
static inline F load_as(const void* row, DType dtype, int64_t i) {
  if (dtype == DType::f32) return load<F>((const float*)row + i);
  using H = std::conditional_t<traits<F>::lanes == 1, uint16_t, vu16>;
  H h;
  memcpy(&h, (const uint16_t*)row + i, sizeof(h));
  return dtype == DType::bf16 ? from_bf16(h) : from_f16(h);
}

template <class F>
static inline void store_as(void* row, DType dtype, int64_t i, F x) {
  if (dtype == DType::f32) return store<F>((float*)row + i, x);
  const auto h = dtype == DType::bf16 ? to_bf16(x) : to_f16(x);
  memcpy((uint16_t*)row + i, &h, sizeof(h));
}

// x[0..n) as float32, zeros up to `to`.
static inline void load_row(const void* x, DType dtype, int64_t n, int64_t to, float* out) {
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    store<F>(out + i, load_as<F>(x, dtype, i));
  });
  for (int64_t i = n; i < to; ++i) out[i] = 0.0f;
}

static inline vf larger(vf a, vf b) { return select(a > b, a, b); }

}  // namespace GM_ISA
}  // namespace gm
