#include <type_traits>

#include "common/slot_blocks.h"
#include "coupling/coupling.h"

namespace gm {
namespace GM_ISA {

template <Scale kScale, bool kInverse>
static double forward_block(const CouplingArgs& a, int64_t row, int64_t slot, int64_t in_at,
                            int64_t out_at, int64_t n, int64_t ahead) {
  Buffer buffers[4];
  const float inverse_clamp = 1.0f / a.clamp;
  const float* x = read_slots(a.x, a.from, a.inner, row, slot, in_at, n, buffers[0]);
  const float* shift = load_block(a.shift, row, slot, n, buffers[1]);
  const float* raw = kScale == Scale::additive ? x : load_block(a.raw, row, slot, n, buffers[2]);
  const Out y = open_slots(a.y, row, out_at, buffers[3]);
  BlockSum sum;
  const RowAhead next_x(a.x, a, row + ahead, slot);
  const Ahead next_shift(a.shift, row + ahead, slot);
  const Ahead next_raw(kScale == Scale::additive ? a.shift : a.raw, row + ahead, slot);
  const auto body = [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using F = decltype(lane);
    const auto s = scaling<kScale, kInverse>(load<F>(raw + i), a.clamp, inverse_clamp);
    sum.add(s.log_s);
    put<F>(y, i, mapped<kInverse>(load<F>(x + i), load<F>(shift + i), s.s));
  };
  for_vectors_ahead(ahead, n, body, next_x, next_shift, next_raw);
  close_slots(a.y, a.to, a.inner, row, slot, out_at, n, buffers[3]);
  return sum.total();
}

template <Scale kScale, bool kInverse>
static void forward_tasks(const CouplingArgs& a, double* sums, int64_t begin, int64_t end) {
  // Narrower rows are read without gaps, which hardware follows.
  const int64_t ahead = rows_ahead(a.y.streaming && a.columns >= 256, a.columns);
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    double sum = 0.0;
    for_parts(
        a, start, n,
        [&](int64_t slot, int64_t in_at, int64_t out_at, int64_t count) {
          sum += forward_block<kScale, kInverse>(a, row, slot, in_at, out_at, count, ahead);
        },
        [&](int64_t slot, int64_t in_at, int64_t out_at, int64_t count) {
          pass(a.x, a.from, a.y, a.to, a.inner, row, slot, in_at, out_at, count);
        });
    sums[task] = sum;
  });
}

template <Scale kScale, bool kInverse>
static void backward_block(const CouplingArgs& a, int64_t row, int64_t slot, int64_t in_at,
                           int64_t out_at, int64_t n, int64_t ahead) {
  Buffer buffers[8];
  const float inverse_clamp = 1.0f / a.clamp;
  const float* x = read_slots(a.x, a.from, a.inner, row, slot, in_at, n, buffers[0]);
  const float* shift = kInverse ? load_block(a.shift, row, slot, n, buffers[1]) : x;
  const float* raw = kScale == Scale::additive ? x : load_block(a.raw, row, slot, n, buffers[2]);
  const float* dy = read_slots(a.dy, a.to, a.inner, row, slot, out_at, n, buffers[3]);
  const float* dlog_det = load_block(a.dlog_det, row, 0, n, buffers[4]);
  const Out dx = open_slots(a.dx, row, in_at, buffers[5]);
  const Out dshift = open_block(a.dshift, row, slot, buffers[6]);
  const Out draw = open_block(a.draw, row, slot, buffers[7]);
  const RowAhead next_dy(a.dy, a, row + ahead, slot);
  const Ahead next_x(a.x, row + ahead, a.begin + slot);
  const Ahead next_shift(kInverse ? a.shift : a.x, row + ahead, kInverse ? slot : a.begin + slot);
  const Ahead next_raw(kScale == Scale::additive ? a.shift : a.raw, row + ahead, slot);
  const auto body = [&](auto lane, int64_t i) __attribute__((always_inline)) {
    using F = decltype(lane);
    const auto g = coupling_gradients<kScale, kInverse>(
        load<F>(x + i), load<F>(shift + i), load<F>(raw + i), load<F>(dy + i),
        load<F>(dlog_det + i), a.clamp, inverse_clamp);
    put<F>(dx, i, g.dx);
    put<F>(dshift, i, g.dshift);
    if constexpr (kScale != Scale::additive) put<F>(draw, i, g.draw);
  };
  for_vectors_ahead(ahead, n, body, next_dy, next_x, next_shift, next_raw);
  close_slots(a.dx, a.from, a.inner, row, slot, in_at, n, buffers[5]);
  close_block(a.dshift, row, slot, n, buffers[6]);
  if constexpr (kScale != Scale::additive) close_block(a.draw, row, slot, n, buffers[7]);
}

template <Scale kScale, bool kInverse>
static void backward_tasks(const CouplingArgs& a, int64_t begin, int64_t end) {
  const int64_t ahead = rows_ahead(a.dx.streaming, a.columns);
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    for_parts(
        a, start, n,
        [&](int64_t slot, int64_t in_at, int64_t out_at, int64_t count) {
          backward_block<kScale, kInverse>(a, row, slot, in_at, out_at, count, ahead);
        },
        [&](int64_t slot, int64_t in_at, int64_t out_at, int64_t count) {
          pass(a.dy, a.to, a.dx, a.from, a.inner, row, slot, out_at, in_at, count);
        });
  });
}

// body(map, is_inverse) with both as constants.
template <class Body>
static void with_map(const CouplingArgs& a, Body body) {
  const auto direction = [&](auto scale) {
    a.inverse ? body(scale, std::bool_constant<true>{}) : body(scale, std::bool_constant<false>{});
  };
  switch (a.scale) {
    case Scale::additive:
      return direction(std::integral_constant<Scale, Scale::additive>{});
    case Scale::exp:
      return direction(std::integral_constant<Scale, Scale::exp>{});
    case Scale::tanh:
      return direction(std::integral_constant<Scale, Scale::tanh>{});
    case Scale::sigmoid:
      return direction(std::integral_constant<Scale, Scale::sigmoid>{});
  }
}

static void forward(const CouplingArgs& a, double* sums, int64_t begin, int64_t end) {
  with_map(a, [&](auto scale, auto inverse) {
    forward_tasks<decltype(scale)::value, decltype(inverse)::value>(a, sums, begin, end);
  });
}

static void backward(const CouplingArgs& a, int64_t begin, int64_t end) {
  with_map(a, [&](auto scale, auto inverse) {
    backward_tasks<decltype(scale)::value, decltype(inverse)::value>(a, begin, end);
  });
}

extern const CouplingTable coupling_table = {forward, backward};

}  // namespace GM_ISA
}  // namespace gm
