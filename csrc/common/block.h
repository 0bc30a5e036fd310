// What every row kernel on the CPU does around its formula: cut rows into chunks, bring blocks of
// any dtype to float32 in the first-level cache, make noise there, and run a body over vectors and
// a tail.
#pragma once

#include "common/convert.h"
#include "common/lockstep.h"
#include "common/math.h"
#include "common/philox.h"
#include "common/rows.h"

namespace gm {
namespace GM_ISA {

static_assert(kChunk % kBlock == 0 && kBlock % (8 * kLanes) == 0, "blocks must tile chunks");

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

// A sum over a block: float32 over four vectors, double between them and over the lanes.
struct BlockSum {
  vf four{};
  vd low{}, high{};  // of the lower and the upper lanes
  double tail = 0.0;
  int vectors = 0;
  void add(vf x) {
    four += x;
    if (++vectors % 4 == 0) widen();
  }
  void add(float x) { tail += (double)x; }
  void widen() {
    vec_of<float, kLanes / 2>::type half[2];
    memcpy(half, &four, sizeof(four));
    low += __builtin_convertvector(half[0], vd);
    high += __builtin_convertvector(half[1], vd);
    four = vf{};
  }
  double total() {
    widen();
    const vd lanes = low + high;
    double sum = tail;
    for (int i = 0; i < kLanes / 2; ++i) sum += lanes[i];
    return sum;
  }
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

// kGroups kLanes counters (d / 4, row, stream) -> the four words of each, as vectors of counters,
// four of them a group.
template <int kGroups = 1>
static inline void philox_words(const NoiseKey& key, uint64_t row, uint32_t counter, vu* words) {
  static const uint64_t kEven[8] = {0, 2, 4, 6, 8, 10, 12, 14};
  vu64 even;
  memcpy(&even, kEven, sizeof(even));
  Lockstep<vu64, 2 * kGroups> c[4];  // of each group the even counters, then the odd ones
  for (int i = 0; i < 2 * kGroups; ++i) {
    c[0].part[i] = even + (counter + (uint32_t)(i / 2 * kLanes + i % 2));
    c[1].part[i] = vu64{} + (uint32_t)row;
    c[2].part[i] = vu64{} + (row >> 32);
    c[3].part[i] = vu64{} + key.stream;
  }
  philox4x32_10(c[0], c[1], c[2], c[3], (uint32_t)key.seed, (uint32_t)(key.seed >> 32));
  for (int i = 0; i < kGroups; ++i)
    for (int j = 0; j < 4; ++j)
      words[4 * i + j] = interleave_words(c[j].part[2 * i], c[j].part[2 * i + 1]);
}

// Groups of 4 kLanes words to as many normals.
#if defined(__AVX512F__)
static inline void normals_of(vu* words, int64_t groups, float* out) {
  for (int64_t g = 0; g < groups; ++g, words += 4, out += 4 * kLanes) {
    vf n[4];
    normal_pair(words[0], words[1], n[0], n[1]);
    normal_pair(words[2], words[3], n[2], n[3]);
    store_transposed4(out, n[0], n[1], n[2], n[3]);
  }
}
#else
// Fewer registers and a shorter window of instructions: radii first, then angles, kStep groups in
// lockstep.
template <int kStep>
[[gnu::always_inline]] static inline void radii_of(vu* words) {
  Lockstep<vu, 2 * kStep> w;
  for (int i = 0; i < 2 * kStep; ++i) w.part[i] = words[2 * i];
  const auto radius = normal_radius<Lockstep<vf, 2 * kStep> >(w);
  for (int i = 0; i < 2 * kStep; ++i) words[2 * i] = (vu)radius.part[i];
}
template <int kStep>
[[gnu::always_inline]] static inline void normals_at(const vu* words, float* out) {
  Lockstep<vu, 2 * kStep> w;
  Lockstep<vf, 2 * kStep> radius, n0, n1;
  for (int i = 0; i < 2 * kStep; ++i) {
    radius.part[i] = (vf)words[2 * i];
    w.part[i] = words[2 * i + 1];
  }
  normals_at(radius, w, n0, n1);
  for (int i = 0; i < 2 * kStep; i += 2)
    store_transposed4(out + 2 * i * kLanes, n0.part[i], n1.part[i], n0.part[i + 1], n1.part[i + 1]);
}
static inline void normals_of(vu* words, int64_t groups, float* out) {
  int64_t g = 0;
  for (; g + 2 <= groups; g += 2) radii_of<2>(words + 4 * g);
  if (g < groups) radii_of<1>(words + 4 * g);
  for (g = 0; g + 2 <= groups; g += 2) normals_at<2>(words + 4 * g, out + 4 * g * kLanes);
  if (g < groups) normals_at<1>(words + 4 * g, out + 4 * g * kLanes);
}
#endif

// Standard normals at positions [start, start + n) of a row; start is a multiple of 4, n at most
// kBlock. Writes whole groups of 4 kLanes, up to 4 kLanes - 1 floats past the end. Words first,
// then normals: two short loops of independent steps keep the core busy where one long chain would
// wait.
static inline void normals(const NoiseKey& key, int64_t row, int64_t start, int64_t n, float* out) {
  constexpr int64_t kGroup = 4 * kLanes;
  alignas(64) vu words[kBlock / kLanes];
  const uint64_t noise_row = key.offset + (uint64_t)row;
  const uint32_t counter = (uint32_t)(start / 4);
  const int64_t groups = (n + kGroup - 1) / kGroup;
  int64_t g = 0;
  for (; g + 2 <= groups; g += 2)
    philox_words<2>(key, noise_row, counter + (uint32_t)g * kLanes, words + 4 * g);
  if (g < groups) philox_words(key, noise_row, counter + (uint32_t)g * kLanes, words + 4 * g);
  normals_of(words, groups, out);
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
