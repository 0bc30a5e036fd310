#include <type_traits>

#include "common/block.h"
#include "elementwise/elementwise.h"

namespace gm {
namespace GM_ISA {

// body(group, first column, n, first row, end of rows) for tasks [begin, end).
template <class Body>
static void for_groups(const ActnormArgs& a, int64_t begin, int64_t end, Body body) {
  const int64_t across = cut(a.columns, kWidth);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / across, start = task % across * kWidth;
    const int64_t n = a.columns - start < kWidth ? a.columns - start : kWidth;
    const int64_t row = group * kGroup;
    body(group, start, n, row, a.rows - row < kGroup ? a.rows : row + kGroup);
  }
  stream_fence();
}

// One block of kRows rows at a time, so that the parameters are read once for all of them.
template <bool kInverse, int kRows>
static void actnorm_block(const ActnormArgs& a, int64_t row, int64_t at, int64_t n) {
  Buffer buffers[2][kRows];
  const float *x[kRows], *shift = a.shift + at, *scale = a.scale + at;
  Out y[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = load_block(a.x, row + r, at, n, buffers[0][r]);
    y[r] = open_block(a.y, row + r, at, buffers[1][r]);
  }
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    const F t = load<F>(shift + i), s = load<F>(scale + i);
    for (int r = 0; r < kRows; ++r) {
      const F v = load<F>(x[r] + i);
      put<F>(y[r], i, kInverse ? fma(v, s, -t) : (v + t) * s);
    }
  });
  for (int r = 0; r < kRows; ++r) close_block(a.y, row + r, at, n, buffers[1][r]);
}

template <bool kInverse>
static void actnorm_tasks(const ActnormArgs& a, int64_t begin, int64_t end) {
  for_groups(a, begin, end, [&](int64_t, int64_t start, int64_t n, int64_t row, int64_t last) {
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      int64_t b = row;
      for (; b + 4 <= last; b += 4) actnorm_block<kInverse, 4>(a, b, at, count);
      for (; b < last; ++b) actnorm_block<kInverse, 1>(a, b, at, count);
    });
  });
}

static void actnorm(const ActnormArgs& a, int64_t begin, int64_t end) {
  a.inverse ? actnorm_tasks<true>(a, begin, end) : actnorm_tasks<false>(a, begin, end);
}

// Likewise; the sums are read and written once for all rows, too.
template <bool kInverse, bool kSums, int kRows>
static void actnorm_backward_block(const ActnormArgs& a, int64_t group, int64_t row, int64_t at,
                                   int64_t n) {
  const int64_t sums_at = group * a.columns + at;
  Buffer buffers[3][kRows];
  const float *g[kRows], *x[kRows], *shift = a.shift + at, *scale = a.scale + at;
  Out dx[kRows];
  for (int r = 0; r < kRows; ++r) {
    g[r] = load_block(a.dy, row + r, at, n, buffers[0][r]);
    x[r] = kSums ? load_block(a.x, row + r, at, n, buffers[1][r]) : g[r];
    dx[r] = open_block(a.dx, row + r, at, buffers[2][r]);
  }
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    const F s = load<F>(scale + i), t = load<F>(shift + i);
    F total{}, total_x{};
    if constexpr (kSums) {
      total = load<F>(a.sum_g + sums_at + i);
      total_x = load<F>(a.sum_gx + sums_at + i);
    }
    for (int r = 0; r < kRows; ++r) {
      const F dy = load<F>(g[r] + i), v = load<F>(x[r] + i);
      put<F>(dx[r], i, dy * s);
      total += dy;
      total_x = fma(dy, kInverse ? v : v + t, total_x);
    }
    if constexpr (kSums) {
      store<F>(a.sum_g + sums_at + i, total);
      store<F>(a.sum_gx + sums_at + i, total_x);
    }
  });
  for (int r = 0; r < kRows; ++r) close_block(a.dx, row + r, at, n, buffers[2][r]);
}

template <bool kInverse, bool kSums>
static void actnorm_backward_tasks(const ActnormArgs& a, int64_t begin, int64_t end) {
  for_groups(a, begin, end,
             [&](int64_t group, int64_t start, int64_t n, int64_t row, int64_t last) {
               for_blocks(start, n, [&](int64_t at, int64_t count) {
                 int64_t b = row;
                 for (; b + 4 <= last; b += 4)
                   actnorm_backward_block<kInverse, kSums, 4>(a, group, b, at, count);
                 for (; b < last; ++b)
                   actnorm_backward_block<kInverse, kSums, 1>(a, group, b, at, count);
               });
             });
}

static void actnorm_backward(const ActnormArgs& a, int64_t begin, int64_t end) {
  if (!a.sum_g) return actnorm_backward_tasks<false, false>(a, begin, end);
  a.inverse ? actnorm_backward_tasks<true, true>(a, begin, end)
            : actnorm_backward_tasks<false, true>(a, begin, end);
}

template <Kind kKind, bool kInverse>
static void pointwise_tasks(const PointwiseArgs& a, double* sums, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    double total = 0.0;
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer buffers[2];
      const float* x = load_block(a.x, row, at, count, buffers[0]);
      const Out y = open_block(a.y, row, at, buffers[1]);
      BlockSum sum;
      for_vectors(count, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        const auto mapped = pointwise_map<kKind, kInverse>(load<F>(x + i), a.parameter, a.m);
        sum.add(mapped.term);
        put<F>(y, i, mapped.y);
      });
      total += sum.total();
      close_block(a.y, row, at, count, buffers[1]);
    });
    sums[task] = total;
  });
}

template <Kind kKind, bool kInverse>
static void pointwise_backward_tasks(const PointwiseArgs& a, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer buffers[4];
      const float* x = load_block(a.x, row, at, count, buffers[0]);
      const float* g = load_block(a.dy, row, at, count, buffers[1]);
      const float* l = load_block(a.dlog_det, row, at, count, buffers[2]);
      const Out dx = open_block(a.dx, row, at, buffers[3]);
      for_vectors(count, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        put<F>(dx, i,
               pointwise_gradient<kKind, kInverse>(load<F>(x + i), load<F>(g + i), load<F>(l + i),
                                                   a.parameter, a.m));
      });
      close_block(a.dx, row, at, count, buffers[3]);
    });
  });
}

// body(kind, is_inverse) with both as constants; leaky's inverse is leaky with 1 / slope.
template <class Body>
static void with_map(const PointwiseArgs& a, Body body) {
  using Leaky = std::integral_constant<Kind, Kind::leaky>;
  using Logit = std::integral_constant<Kind, Kind::logit>;
  if (a.kind == Kind::leaky) return body(Leaky{}, std::false_type{});
  a.inverse ? body(Logit{}, std::true_type{}) : body(Logit{}, std::false_type{});
}

static void pointwise(const PointwiseArgs& a, double* sums, int64_t begin, int64_t end) {
  with_map(a, [&](auto kind, auto inverse) {
    pointwise_tasks<decltype(kind)::value, decltype(inverse)::value>(a, sums, begin, end);
  });
}

static void pointwise_backward(const PointwiseArgs& a, int64_t begin, int64_t end) {
  with_map(a, [&](auto kind, auto inverse) {
    pointwise_backward_tasks<decltype(kind)::value, decltype(inverse)::value>(a, begin, end);
  });
}

template <class T>
static void widen(const void* levels, int64_t at, int64_t n, float* out) {
  const T* in = (const T*)levels + at;
  for (int64_t i = 0; i < n; ++i) out[i] = (float)in[i];
}

static void load_levels(const DequantizeArgs& a, int64_t at, int64_t n, float* out) {
  if (a.dtype == DType::u8) return widen<uint8_t>(a.levels, at, n, out);
  if (a.dtype == DType::i32) return widen<int32_t>(a.levels, at, n, out);
  widen<int64_t>(a.levels, at, n, out);
}

static void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer levels, noise;
      const int64_t first = row * a.columns + at;
      load_levels(a, first, count, levels.data);
      if (!a.u) uniforms(a.key, row, at, count, noise.data);
      const Out x = open_block(a.x, row, at, noise);
      for_vectors(count, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        const F k = load<F>(levels.data + i);
        const F u = a.u ? load<F>(a.u + first + i) : 1.0f - load<F>(noise.data + i);
        const F low = k * a.low, high = (k + 1.0f) * a.high, v = (k + u) * a.factor;
        const F raised = select(v < low, low, v);
        put<F>(x, i, select(raised > high, high, raised));
      });
    });
  });
}

extern const ElementwiseTable elementwise_table = {actnorm, actnorm_backward, pointwise,
                                                   pointwise_backward, dequantize};

}  // namespace GM_ISA
}  // namespace gm
