#include <algorithm>

#include "common/head_rows.h"
#include "rotary/rotary.h"

namespace gm {
namespace GM_ISA {

static const float* load_at(const HeadRows& x, int64_t at, int64_t n, Buffer& buffer) {
  return load_block({x.data, 0, 1, x.dtype}, 0, at, n, buffer);
}

static int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Half-split pairs of one head of one token.
static void turn_halves(const RotaryArgs& a, int64_t x_at, int64_t y_at, const float* cos,
                        const float* sin, float sign) {
  const char* x = (const char*)a.x.data + x_at * size_of(a.x.dtype);
  char* y = (char*)a.y.data + y_at * size_of(a.y.dtype);
  for_vectors(a.half, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    const F p = load_as<F>(x, a.x.dtype, i), q = load_as<F>(x, a.x.dtype, a.half + i);
    const F c = load<F>(cos + i), s = load<F>(sin + i) * sign;
    store_as(y, a.y.dtype, i, fma(p, c, -(q * s)));
    store_as(y, a.y.dtype, a.half + i, fma(q, c, p * s));
  });
}

static vf swap_neighbours(vf x) { return (vf)(((vu64)x >> 32) | ((vu64)x << 32)); }

// Neighbouring pairs [i, i + n) of every head of one token: x c + x' s, where x' has the two of
// each pair swapped, and s the sign of each.
static void turn_neighbours(const RotaryArgs& a, int64_t x_at, int64_t y_at, const float* cos,
                            const float* sin, int64_t i, int64_t n, float sign) {
  Buffer buffers[2], c, s;
  for (int64_t j = 0; j < n; ++j) {
    c.data[2 * j] = c.data[2 * j + 1] = cos[i + j];
    s.data[2 * j] = -sin[i + j] * sign;
    s.data[2 * j + 1] = sin[i + j] * sign;
  }
  for (int64_t h = 0; h < a.sizes.heads; ++h) {
    const float* x = load_at(a.x, x_at + h * a.x.head + 2 * i, 2 * n, buffers[0]);
    const int64_t out = y_at + h * a.sizes.tokens * a.sizes.width + 2 * i;
    const Out y = open_block(a.y, 0, out, buffers[1]);
    for_vectors(2 * n, [&](auto lane, int64_t j) {
      using F = decltype(lane);
      F swapped;
      if constexpr (traits<F>::lanes > 1) {
        swapped = swap_neighbours(load<F>(x + j));
      } else {
        swapped = x[j ^ 1];
      }
      put<F>(y, j, fma(load<F>(x + j), load<F>(c.data + j), swapped * load<F>(s.data + j)));
    });
    close_block(a.y, 0, out, 2 * n, buffers[1]);
  }
}

// Features [2 half, D) of one head of one token.
static void pass_rest(const RotaryArgs& a, int64_t x_at, int64_t y_at) {
  const int64_t first = 2 * a.half, size = size_of(a.x.dtype);
  memcpy((char*)a.y.data + (y_at + first) * size, (const char*)a.x.data + (x_at + first) * size,
         (a.sizes.width - first) * size);
}

// Tokens [first, last) of sequence b, heads outside: the heads of a token lie a power of two apart
// in y, and the lines of a few of them fill a set of the cache.
static void turn_tokens(const RotaryArgs& a, int64_t b, int64_t first, int64_t last) {
  constexpr int64_t kPairs = kBlock / 2;
  const HeadSizes& z = a.sizes;
  const float sign = a.inverse ? -1.0f : 1.0f;
  const auto place = [&](int64_t t) {
    return (a.position ? a.position[b * a.position_stride + t] : t) * a.half;
  };
  for (int64_t t = first; t < last && a.interleaved; ++t)
    for (int64_t i = 0; i < a.half; i += kPairs)
      turn_neighbours(a, b * a.x.batch + t * a.x.token, (b * z.heads * z.tokens + t) * z.width,
                      a.cos + place(t), a.sin + place(t), i,
                      a.half - i < kPairs ? a.half - i : kPairs, sign);
  for (int64_t h = 0; h < z.heads; ++h)
    for (int64_t t = first; t < last; ++t) {
      const int64_t x_at = b * a.x.batch + h * a.x.head + t * a.x.token;
      const int64_t y_at = ((b * z.heads + h) * z.tokens + t) * z.width;
      if (!a.interleaved) turn_halves(a, x_at, y_at, a.cos + place(t), a.sin + place(t), sign);
      if (2 * a.half < z.width) pass_rest(a, x_at, y_at);
    }
}

static void rotary_embedding(const RotaryArgs& a, int64_t begin, int64_t end) {
  const int64_t tokens = a.sizes.tokens;
  for (int64_t at = begin; at < end;) {
    const int64_t b = at / tokens, t = at % tokens;
    const int64_t n = std::min({(int64_t)16, tokens - t, end - at});
    turn_tokens(a, b, t, t + n);
    at += n;
  }
}

// Where a row begins in y, x and dy.
struct RowPlace {
  int64_t y, x, dy;
};

// body(place) for rows [begin, end), in y's order.
template <class Body>
static inline void for_rows(const RmsNormArgs& a, int64_t begin, int64_t end, Body body) {
  const HeadSizes& z = a.sizes;
  int64_t t = begin % z.tokens, h = begin / z.tokens % z.heads, b = begin / z.tokens / z.heads;
  for (int64_t row = begin; row < end; ++row) {
    body(RowPlace{row * z.width, b * a.x.batch + h * a.x.head + t * a.x.token,
                  b * a.dy.batch + h * a.dy.head + t * a.dy.token});
    if (++t < z.tokens) continue;
    t = 0;
    if (++h == z.heads) h = 0, ++b;
  }
}

// Sums over a row, whose blocks come one after another: four chains of additions, then a tail.
struct RowSum {
  vf lanes[4] = {};
  float tail = 0.0f;
  template <class Term>
  void add(int64_t n, Term term) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) lanes[j] += term(vf{}, i + j * kLanes);
    for (; i + kLanes <= n; i += kLanes) lanes[0] += term(vf{}, i);
    for (; i < n; ++i) tail += term(float{}, i);
  }
  float total() const { return sum_lanes((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + tail; }
};

static inline float inverse_root(const RmsNormArgs& a, float squares) {
  return 1.0f / sqrt_ieee(squares / (float)a.sizes.width + a.eps);
}

template <bool kWeight>
static void normalise(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.sizes.width;
  Buffer buffers[2];
  for_rows(a, begin, end, [&](const RowPlace& row) {
    RowSum squares;
    for_blocks(0, width, [&](int64_t at, int64_t n) {
      const float* x = load_at(a.x, row.x + at, n, buffers[0]);
      squares.add(n, [&](auto lane, int64_t i) {
        const auto v = load<decltype(lane)>(x + i);
        return v * v;
      });
    });
    const float r = inverse_root(a, squares.total());
    for_blocks(0, width, [&](int64_t at, int64_t n) {
      const float* x = load_at(a.x, row.x + at, n, buffers[0]);
      const Out y = open_block(a.y, 0, row.y + at, buffers[1]);
      for_vectors(n, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        const F v = load<F>(x + i) * r;
        put<F>(y, i, kWeight ? v * load<F>(a.weight + at + i) : v);
      });
      close_block(a.y, 0, row.y + at, n, buffers[1]);
    });
  });
}

// The weight of rows of V vectors.
template <int V>
static inline void load_weight(const RmsNormArgs& a, vf w[V]) {
  for (int i = 0; i < V; ++i) w[i] = a.weight ? load<vf>(a.weight + i * kLanes) : splat<vf>(1.0f);
}

template <int V>
static inline void load_vectors(const HeadRows& x, int64_t at, vf v[V]) {
  const char* row = (const char*)x.data + at * size_of(x.dtype);
  for (int i = 0; i < V; ++i) v[i] = load_as<vf>(row, x.dtype, i * kLanes);
}

template <int V>
static inline float dot(const vf x[V], const vf y[V]) {
  vf sums[2] = {x[0] * y[0], x[1] * y[1]};
#pragma GCC unroll 8
  for (int i = 2; i < V; ++i) sums[i % 2] = fma(x[i], y[i], sums[i % 2]);
  return sum_lanes(sums[0] + sums[1]);
}

// Rows of V vectors: they stay in registers, and the weight does.
template <int V>
static void normalise_vectors(const RmsNormArgs& a, int64_t begin, int64_t end) {
  vf w[V];
  load_weight<V>(a, w);
  for_rows(a, begin, end, [&](const RowPlace& row) {
    vf x[V];
    load_vectors<V>(a.x, row.x, x);
    const float r = inverse_root(a, dot<V>(x, x));
    char* y = (char*)a.y.data + row.y * size_of(a.y.dtype);
    for (int i = 0; i < V; ++i) store_as(y, a.y.dtype, i * kLanes, x[i] * r * w[i]);
  });
}

static void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
  switch (a.sizes.width) {
    case 2 * kLanes:
      return normalise_vectors<2>(a, begin, end);
    case 4 * kLanes:
      return normalise_vectors<4>(a, begin, end);
    case 8 * kLanes:
      return normalise_vectors<8>(a, begin, end);
  }
  a.weight ? normalise<true>(a, begin, end) : normalise<false>(a, begin, end);
}

template <bool kWeight>
static void normalise_backward(const RmsNormArgs& a, int64_t begin, int64_t end, float* dweight) {
  const int64_t width = a.sizes.width;
  const auto scaled = [&](auto lane, const float* dy, int64_t at, int64_t i) {
    using F = decltype(lane);
    return kWeight ? load<F>(dy + i) * load<F>(a.weight + at + i) : load<F>(dy + i);
  };
  Buffer buffers[3];
  for_rows(a, begin, end, [&](const RowPlace& row) {
    RowSum squares, products;
    for_blocks(0, width, [&](int64_t at, int64_t n) {
      const float* x = load_at(a.x, row.x + at, n, buffers[0]);
      const float* dy = load_at(a.dy, row.dy + at, n, buffers[1]);
      squares.add(n, [&](auto lane, int64_t i) {
        const auto v = load<decltype(lane)>(x + i);
        return v * v;
      });
      products.add(n, [&](auto lane, int64_t i) {
        return load<decltype(lane)>(x + i) * scaled(lane, dy, at, i);
      });
    });
    const float r = inverse_root(a, squares.total());
    const float c = r * r * (products.total() / (float)width);
    for_blocks(0, width, [&](int64_t at, int64_t n) {
      const float* x = load_at(a.x, row.x + at, n, buffers[0]);
      const float* dy = load_at(a.dy, row.dy + at, n, buffers[1]);
      const Out dx = open_block(a.dx, 0, row.y + at, buffers[2]);
      for_vectors(n, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        const F v = load<F>(x + i);
        put<F>(dx, i, (scaled(lane, dy, at, i) - v * c) * r);
        if (dweight) {
          float* sum = dweight + at + i;
          store<F>(sum, fma(load<F>(dy + i), v * r, load<F>(sum)));
        }
      });
      close_block(a.dx, 0, row.y + at, n, buffers[2]);
    });
  });
}

template <int V>
static void normalise_vectors_backward(const RmsNormArgs& a, int64_t begin, int64_t end,
                                       float* dweight) {
  vf w[V], dw[V] = {};
  load_weight<V>(a, w);
  for_rows(a, begin, end, [&](const RowPlace& row) {
    vf x[V], dy[V], scaled[V];
    load_vectors<V>(a.x, row.x, x);
    load_vectors<V>(a.dy, row.dy, dy);
    for (int i = 0; i < V; ++i) scaled[i] = dy[i] * w[i];
    const float r = inverse_root(a, dot<V>(x, x));
    const float c = r * r * (dot<V>(x, scaled) / (float)a.sizes.width);
    for (int i = 0; i < V; ++i) dw[i] = fma(dy[i], x[i] * r, dw[i]);
    if (!a.dx.data) return;
    char* dx = (char*)a.dx.data + row.y * size_of(a.dx.dtype);
    for (int i = 0; i < V; ++i) store_as(dx, a.dx.dtype, i * kLanes, (scaled[i] - x[i] * c) * r);
  });
  if (!dweight) return;
  for (int i = 0; i < V; ++i) store<vf>(dweight + i * kLanes, dw[i]);
}

// Rows [begin, end) of one group.
static void backward_rows(const RmsNormArgs& a, int64_t begin, int64_t end, float* dweight) {
  switch (a.sizes.width) {
    case 2 * kLanes:
      return normalise_vectors_backward<2>(a, begin, end, dweight);
    case 4 * kLanes:
      return normalise_vectors_backward<4>(a, begin, end, dweight);
    case 8 * kLanes:
      return normalise_vectors_backward<8>(a, begin, end, dweight);
  }
  (a.weight ? normalise_backward<true> : normalise_backward<false>)(a, begin, end, dweight);
}

static void rms_norm_backward(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = group * kRowGroup, rows = a.sizes.rows();
    const int64_t last = row + kRowGroup < rows ? row + kRowGroup : rows;
    backward_rows(a, row, last, a.dweight ? a.dweight + group * a.sizes.width : nullptr);
  }
}

extern const RotaryTable rotary_table = {rotary_embedding, rms_norm, rms_norm_backward};

}  // namespace GM_ISA
}  // namespace gm
