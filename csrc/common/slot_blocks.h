// What a CPU kernel on part of a row does around its formula: find the blocks of slots, read and
// write them in place or through a table, and copy what passes.
#pragma once

#include "common/ahead.h"
#include "common/slots.h"

namespace gm {
namespace GM_ISA {

constexpr int64_t kGathered = 32;  // units with fewer elements are gathered one by one
constexpr int64_t kNowhere = -1;   // the position of slots that are gathered or scattered

// body(i, position) for n slots of a table of units.
template <class Body>
static inline void for_positions(const int32_t* table, int64_t inner, int64_t slot, int64_t n,
                                 Body body) {
  if (inner == 1) {
    for (int64_t i = 0; i < n; ++i) body(i, (int64_t)table[slot + i]);
    return;
  }
  int64_t unit = slot / inner, r = slot % inner;
  for (int64_t i = 0; i < n; ++i) {
    body(i, table[unit] * inner + r);
    if (++r == inner) {
      r = 0;
      ++unit;
    }
  }
}

// A block of slots as float32: from one run of the row, or gathered by the table.
static inline const float* read_slots(const Operand& x, const int32_t* table, int64_t inner,
                                      int64_t row, int64_t slot, int64_t position, int64_t n,
                                      Buffer& buffer) {
  if (position != kNowhere || !x.data) return load_block(x, row, position, n, buffer);
  const int64_t base = row * x.row_stride;
  float* out = buffer.data;
  if (x.dtype == DType::f32) {
    const float* in = (const float*)x.data + base;
    for_positions(table, inner, slot, n, [&](int64_t i, int64_t at) { out[i] = in[at]; });
  } else {
    const uint16_t* in = (const uint16_t*)x.data + base;
    const bool is_bf16 = x.dtype == DType::bf16;
    for_positions(table, inner, slot, n, [&](int64_t i, int64_t at) {
      out[i] = is_bf16 ? from_bf16(in[at]) : from_f16(in[at]);
    });
  }
  return out;
}

static inline Out open_slots(const Result& y, int64_t row, int64_t position, Buffer& buffer) {
  return position == kNowhere ? Out{buffer.data, false} : open_block(y, row, position, buffer);
}

static inline void close_slots(const Result& y, const int32_t* table, int64_t inner, int64_t row,
                               int64_t slot, int64_t position, int64_t n, const Buffer& buffer) {
  if (position != kNowhere || !y.data) return close_block(y, row, position, n, buffer);
  const int64_t base = row * y.row_stride;
  const float* in = buffer.data;
  if (y.dtype == DType::f32) {
    float* out = (float*)y.data + base;
    for_positions(table, inner, slot, n, [&](int64_t i, int64_t at) { out[at] = in[i]; });
  } else {
    uint16_t* out = (uint16_t*)y.data + base;
    const bool is_bf16 = y.dtype == DType::bf16;
    for_positions(table, inner, slot, n, [&](int64_t i, int64_t at) {
      out[at] = is_bf16 ? to_bf16(in[i]) : to_f16(in[i]);
    });
  }
}

// body(slot, input position, output position, n) for blocks of slots [slot, slot + n), which are
// either all transformed or all pass.
template <class Body>
static inline void for_runs(const Slots& a, int64_t slot, int64_t n, Body body) {
  const auto blocks = [&](int64_t first, int64_t in, int64_t out, int64_t count) {
    for_blocks(first, count,
               [&](int64_t at, int64_t m) { body(at, in + (at - first), out + (at - first), m); });
  };
  if (!a.from) {
    if (slot < a.part) return blocks(slot, a.begin + slot, a.begin + slot, n);
    const int64_t at = slot - a.part;  // among what passes
    const int64_t before = at < a.begin ? (a.begin - at < n ? a.begin - at : n) : 0;
    blocks(slot, at, at, before);
    blocks(slot + before, slot + before, slot + before, n - before);
    return;
  }
  if (a.inner < kGathered) {
    for_blocks(slot, n, [&](int64_t at, int64_t m) { body(at, kNowhere, kNowhere, m); });
    return;
  }
  for (const int64_t end = slot + n; slot < end;) {
    const int64_t unit = slot / a.inner, r = slot % a.inner;
    const int64_t m = a.inner - r < end - slot ? a.inner - r : end - slot;
    blocks(slot, a.from[unit] * a.inner + r, a.to[unit] * a.inner + r, m);
    slot += m;
  }
}

// transformed(...) and passed(...) as in for_runs(), for the two parts of a chunk of slots.
template <class Transformed, class Passed>
static inline void for_parts(const Slots& a, int64_t start, int64_t n, Transformed transformed,
                             Passed passed) {
  const int64_t end = start + n;
  const int64_t middle = a.part < start ? start : a.part > end ? end : a.part;
  for_runs(a, start, middle - start, transformed);
  for_runs(a, middle, end - middle, passed);
}

// Both parts of a row with slots: the transformed one, and of the other as much.
struct RowAhead {
  Ahead mapped, passed;
  RowAhead(const Operand& x, const Slots& a, int64_t row, int64_t slot)
      : mapped(x, row, a.begin + slot), passed(x, row, slot < a.begin ? slot : slot + a.part) {}
  [[gnu::always_inline]] void ask(int64_t i) const {
    mapped.ask(i);
    passed.ask(i);
  }
};

static inline void copy_bits(const Operand& x, int64_t x_at, const Result& y, int64_t y_at,
                             int64_t n) {
  const int64_t size = x.dtype == DType::f32 ? 4 : 2, bytes = n * size;
  const char* in = (const char*)x.data + x_at * size;
  char* out = (char*)y.data + y_at * size;
  int64_t i = 0;
  if (y.streaming) {
    // A run starts at a multiple of 16 elements: 64 bytes, or 32 in the 16-bit dtypes.
    using Line = vec_of<char, kLanes * 2>::type;
    for (; i + (int64_t)sizeof(Line) <= bytes; i += sizeof(Line)) {
      Line line;
      memcpy(&line, in + i, sizeof(Line));
      stream(out + i, line);
    }
  }
  memcpy(out + i, in + i, bytes - i);
}

// y at the output position = x at the input position, for slots that pass. to: the table of y.
static void pass(const Operand& x, const int32_t* from, const Result& y, const int32_t* to,
                 int64_t inner, int64_t row, int64_t slot, int64_t x_at, int64_t y_at, int64_t n) {
  if (!y.data) return;
  if (x.data && x.dtype == y.dtype && x_at != kNowhere) {
    return copy_bits(x, row * x.row_stride + x_at, y, row * y.row_stride + y_at, n);
  }
  Buffer buffers[2];
  const float* in = read_slots(x, from, inner, row, slot, x_at, n, buffers[0]);
  const Out out = open_slots(y, row, y_at, buffers[1]);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    put<F>(out, i, load<F>(in + i));
  });
  close_slots(y, to, inner, row, slot, y_at, n, buffers[1]);
}

}  // namespace GM_ISA
}  // namespace gm
