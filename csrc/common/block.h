// What every row kernel on the CPU does around its formula: cut rows into chunks, bring blocks of
// any dtype to float32 in the first-level cache, make noise there, and run a body over vectors and
// a tail.
#pragma once

#include "common/convert.h"
#include "common/math.h"
#include "common/philox.h"
#include "common/rows.h"

namespace gm {
namespace GM_ISA {

static_assert(kChunk % kBlock == 0 && kBlock % (4 * kLanes) == 0, "blocks must tile chunks");

struct alignas(64) Buffer {
  float data[kBlock];
};

// body(F{}, i) for whole vectors with F = vf, then for the tail with F = float.
template <class Body>
static inline void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(vf{}, i);
  for (; i < n; ++i) body(float{}, i);
}

// A sum over a block: lanes first, then the tail.
struct BlockSum {
  vf lanes{};
  float tail = 0.0f;
  void add(vf x) { lanes += x; }
  void add(float x) { tail += x; }
  double total() const { return (double)sum_lanes(lanes) + (double)tail; }
};

// Elements [start, start + n) of a row as float32: in place if they are, else in the buffer. An
// absent operand reads as zeros.
static inline const float* load_block(const Operand& x, int64_t row, int64_t start, int64_t n,
                                      Buffer& buffer) {
  float* out = buffer.data;
  if (!x.data) {
    memset(out, 0, n * sizeof(float));
    return out;
  }
  const int64_t at = row * x.row_stride + start * x.stride;
  if (x.stride == 0) {
    float value;
    if (x.dtype == DType::f32) {
      value = ((const float*)x.data)[at];
    } else {
      const uint16_t h = ((const uint16_t*)x.data)[at];
      value = x.dtype == DType::bf16 ? from_bf16(h) : from_f16(h);
    }
    for (int64_t i = 0; i < n; ++i) out[i] = value;
    return out;
  }
  if (x.dtype == DType::f32) return (const float*)x.data + at;
  const uint16_t* in = (const uint16_t*)x.data + at;
  const bool is_bf16 = x.dtype == DType::bf16;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vu16 h;
    memcpy(&h, in + i, sizeof(h));
    store<vf>(out + i, is_bf16 ? from_bf16(h) : from_f16(h));
  }
  for (; i < n; ++i) out[i] = is_bf16 ? from_bf16(in[i]) : from_f16(in[i]);
  return out;
}

// Where a block of results is written. past: by stores past the caches.
struct Out {
  float* data;
  bool past;
};

template <class F>
static inline void put(const Out& out, int64_t i, F x) {
  if constexpr (traits<F>::lanes > 1) {
    if (out.past) return stream(out.data + i, x);
  }
  store<F>(out.data + i, x);
}

// The output itself if it is float32, else the buffer.
static inline Out open_block(const Result& y, int64_t row, int64_t start, Buffer& buffer) {
  if (!y.data || y.dtype != DType::f32) return {buffer.data, false};
  return {(float*)y.data + row * y.row_stride + start, y.streaming};
}

// Converts a block that open_block() put into the buffer; nothing to do for float32.
static inline void close_block(const Result& y, int64_t row, int64_t start, int64_t n,
                               const Buffer& buffer) {
  if (!y.data || y.dtype == DType::f32) return;
  uint16_t* out = (uint16_t*)y.data + row * y.row_stride + start;
  const bool is_bf16 = y.dtype == DType::bf16;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf x = load<vf>(buffer.data + i);
    const vu16 h = is_bf16 ? to_bf16(x) : to_f16(x);
    if (y.streaming) {
      stream(out + i, h);
    } else {
      memcpy(out + i, &h, sizeof(h));
    }
  }
  for (; i < n; ++i) out[i] = is_bf16 ? to_bf16(buffer.data[i]) : to_f16(buffer.data[i]);
}

// kLanes counters (d / 4, row, stream) -> the four words of each, as vectors of counters.
static inline void philox_words(const NoiseKey& key, uint64_t row, uint32_t counter, vu words[4]) {
  static const uint64_t kEven[8] = {0, 2, 4, 6, 8, 10, 12, 14};
  vu64 even;
  memcpy(&even, kEven, sizeof(even));
  even += counter;
  const vu64 odd = even + 1;
  const uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
  vu64 e[4] = {even, vu64{} + (uint32_t)row, vu64{} + (row >> 32), vu64{} + key.stream};
  vu64 o[4] = {odd, e[1], e[2], e[3]};
  philox4x32_10(e[0], e[1], e[2], e[3], k0, k1);
  philox4x32_10(o[0], o[1], o[2], o[3], k0, k1);
  for (int j = 0; j < 4; ++j) words[j] = interleave_words(e[j], o[j]);
}

// Standard normals at positions [start, start + n) of a row; start is a multiple of 4, n at most
// kBlock. Writes whole groups of 4 kLanes, up to 4 kLanes - 1 floats past the end. Words first,
// then normals: two short loops of independent steps keep the core busy where one long chain would
// wait.
static inline void normals(const NoiseKey& key, int64_t row, int64_t start, int64_t n, float* out) {
  alignas(64) vu words[kBlock / kLanes];
  for (int64_t i = 0; i < n; i += 4 * kLanes)
    philox_words(key, key.offset + (uint64_t)row, (uint32_t)((start + i) / 4), words + i / kLanes);
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    const vu* w = words + i / kLanes;
    vf n0, n1, n2, n3;
    normal_pair(w[0], w[1], n0, n1);
    normal_pair(w[2], w[3], n2, n3);
    store_transposed4(out + i, n0, n1, n2, n3);
  }
}

// Uniforms in (0, 1] likewise.
static inline void uniforms(const NoiseKey& key, int64_t row, int64_t start, int64_t n,
                            float* out) {
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    vu w[4];
    philox_words(key, key.offset + (uint64_t)row, (uint32_t)((start + i) / 4), w);
    store_transposed4(out + i, uniform_from(to_float(w[0])), uniform_from(to_float(w[1])),
                      uniform_from(to_float(w[2])), uniform_from(to_float(w[3])));
  }
}

static inline const float* normal_block(const NoiseKey& key, int64_t row, int64_t start, int64_t n,
                                        Buffer& buffer) {
  normals(key, row, start, n, buffer.data);
  return buffer.data;
}

// Runs body(task, row, start, n) for tasks [begin, end) of a row layout; see rows.h.
template <class Body>
static inline void for_chunks(int64_t columns, int64_t begin, int64_t end, Body body) {
  const int64_t chunks = chunks_of(columns);
  int64_t row = begin / chunks, chunk = begin % chunks;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t start = chunk * kChunk;
    const int64_t n = columns - start < kChunk ? columns - start : kChunk;
    body(task, row, start, n);
    if (++chunk == chunks) {
      chunk = 0;
      ++row;
    }
  }
  stream_fence();
}

// Runs body(at, count) for the blocks of one chunk.
template <class Body>
static inline void for_blocks(int64_t start, int64_t n, Body body) {
  for (int64_t at = start; at < start + n; at += kBlock) {
    body(at, start + n - at < kBlock ? start + n - at : (int64_t)kBlock);
  }
}

}  // namespace GM_ISA
}  // namespace gm
