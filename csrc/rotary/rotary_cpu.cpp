#include "common/block.h"
#include "rotary/rotary.h"

namespace gm {
namespace GM_ISA {

static const float* load_at(const HeadRows& x, int64_t at, int64_t n, Buffer& buffer) {
  return load_block({x.data, 0, 1, x.dtype}, 0, at, n, buffer);
}

// Half-split pairs [i, i + n) of every head of one token.
static void turn_halves(const RotaryArgs& a, int64_t x_at, int64_t y_at, const float* cos,
                        const float* sin, int64_t i, int64_t n, float sign) {
  Buffer buffers[4];
  for (int64_t h = 0; h < a.sizes.heads; ++h) {
    const float* first = load_at(a.x, x_at + h * a.x.head + i, n, buffers[0]);
    const float* second = load_at(a.x, x_at + h * a.x.head + a.half + i, n, buffers[1]);
    const int64_t out = y_at + h * a.sizes.tokens * a.sizes.width + i;
    const Out y1 = open_block(a.y, 0, out, buffers[2]);
    const Out y2 = open_block(a.y, 0, out + a.half, buffers[3]);
    for_vectors(n, [&](auto lane, int64_t j) {
      using F = decltype(lane);
      const F p = load<F>(first + j), q = load<F>(second + j);
      const F c = load<F>(cos + i + j), s = load<F>(sin + i + j) * sign;
      put<F>(y1, j, fma(p, c, -(q * s)));
      put<F>(y2, j, fma(q, c, p * s));
    });
    close_block(a.y, 0, out, n, buffers[2]);
    close_block(a.y, 0, out + a.half, n, buffers[3]);
  }
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

// Features [2 half, D) of every head of one token.
static void pass_rest(const RotaryArgs& a, int64_t x_at, int64_t y_at) {
  const int64_t first = 2 * a.half, size = a.x.dtype == DType::f32 ? 4 : 2;
  for (int64_t h = 0; h < a.sizes.heads; ++h) {
    memcpy((char*)a.y.data + (y_at + h * a.sizes.tokens * a.sizes.width + first) * size,
           (const char*)a.x.data + (x_at + h * a.x.head + first) * size,
           (a.sizes.width - first) * size);
  }
}

static void rotary_embedding(const RotaryArgs& a, int64_t begin, int64_t end) {
  const HeadSizes& z = a.sizes;
  const int64_t step = a.interleaved ? kBlock / 2 : kBlock;
  const float sign = a.inverse ? -1.0f : 1.0f;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / z.tokens, t = token % z.tokens;
    const int64_t place = a.position ? a.position[b * a.position_stride + t] : t;
    const float *cos = a.cos + place * a.half, *sin = a.sin + place * a.half;
    const int64_t x_at = b * a.x.batch + t * a.x.token;
    const int64_t y_at = (b * z.heads * z.tokens + t) * z.width;
    for (int64_t i = 0; i < a.half; i += step) {
      const int64_t n = a.half - i < step ? a.half - i : step;
      (a.interleaved ? turn_neighbours : turn_halves)(a, x_at, y_at, cos, sin, i, n, sign);
    }
    if (2 * a.half < z.width) pass_rest(a, x_at, y_at);
  }
}

// Up to kLanes rows, by where they begin.
struct Rows {
  int count;
  int64_t y[kLanes], x[kLanes], dy[kLanes];
};

// body(rows) for rows [begin, end), every head of a token before the next token: so a part of
// [B, T, 3 H D] is read in one piece.
template <class Body>
static void for_rows(const RmsNormArgs& a, int64_t begin, int64_t end, Body body) {
  const HeadSizes& z = a.sizes;
  int64_t h = begin % z.heads, t = begin / z.heads % z.tokens, b = begin / z.heads / z.tokens;
  Rows rows;
  for (int64_t row = begin; row < end;) {
    for (rows.count = 0; rows.count < kLanes && row < end; ++rows.count, ++row) {
      rows.y[rows.count] = ((b * z.heads + h) * z.tokens + t) * z.width;
      rows.x[rows.count] = b * a.x.batch + h * a.x.head + t * a.x.token;
      rows.dy[rows.count] = b * a.dy.batch + h * a.dy.head + t * a.dy.token;
      if (++h < z.heads) continue;
      h = 0;
      if (++t == z.tokens) t = 0, ++b;
    }
    body(rows);
  }
}

// One sum for each of kLanes rows, whose lanes come one row after another.
struct RowSums {
  alignas(64) float lanes[kLanes * kLanes] = {};
  void add(int row, const BlockSum& sum) {
    float* to = lanes + row * kLanes;
    store<vf>(to, load<vf>(to) + sum.lanes);
    to[0] += sum.tail;
  }
  vf mean(int64_t n) const {
    vf total{};
    for (int j = 0; j < kLanes; j += 4) {
      vf x[4];
      load_columns4(lanes + j, kLanes, x);
      total += (x[0] + x[1]) + (x[2] + x[3]);
    }
    return total / splat<vf>((float)n);
  }
};

template <bool kWeight>
static void normalise(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const int64_t width = a.sizes.width;
  for_rows(a, begin, end, [&](const Rows& rows) {
    Buffer buffers[2];
    RowSums sums;
    for (int k = 0; k < rows.count; ++k) {
      for_blocks(0, width, [&](int64_t at, int64_t n) {
        const float* x = load_at(a.x, rows.x[k] + at, n, buffers[0]);
        BlockSum squares;
        for_vectors(n, [&](auto lane, int64_t i) {
          using F = decltype(lane);
          const F v = load<F>(x + i);
          squares.add(v * v);
        });
        sums.add(k, squares);
      });
    }
    const vf roots = 1.0f / sqrt_ieee(sums.mean(width) + a.eps);
    for (int k = 0; k < rows.count; ++k) {
      const float r = roots[k];
      for_blocks(0, width, [&](int64_t at, int64_t n) {
        const float* x = load_at(a.x, rows.x[k] + at, n, buffers[0]);
        const Out y = open_block(a.y, 0, rows.y[k] + at, buffers[1]);
        for_vectors(n, [&](auto lane, int64_t i) {
          using F = decltype(lane);
          const F v = load<F>(x + i) * r;
          put<F>(y, i, kWeight ? v * load<F>(a.weight + at + i) : v);
        });
        close_block(a.y, 0, rows.y[k] + at, n, buffers[1]);
      });
    }
  });
}

static void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
  a.weight ? normalise<true>(a, begin, end) : normalise<false>(a, begin, end);
}

template <bool kWeight>
static void normalise_backward(const RmsNormArgs& a, int64_t begin, int64_t end, float* dweight) {
  const int64_t width = a.sizes.width;
  const auto scaled = [&](auto lane, const float* dy, int64_t at, int64_t i) {
    using F = decltype(lane);
    return kWeight ? load<F>(dy + i) * load<F>(a.weight + at + i) : load<F>(dy + i);
  };
  for_rows(a, begin, end, [&](const Rows& rows) {
    Buffer buffers[3];
    RowSums sums, sums_of_products;
    for (int k = 0; k < rows.count; ++k) {
      for_blocks(0, width, [&](int64_t at, int64_t n) {
        const float* x = load_at(a.x, rows.x[k] + at, n, buffers[0]);
        const float* dy = load_at(a.dy, rows.dy[k] + at, n, buffers[1]);
        BlockSum squares, products;
        for_vectors(n, [&](auto lane, int64_t i) {
          using F = decltype(lane);
          const F v = load<F>(x + i);
          squares.add(v * v);
          products.add(v * scaled(lane, dy, at, i));
        });
        sums.add(k, squares);
        sums_of_products.add(k, products);
      });
    }
    const vf roots = 1.0f / sqrt_ieee(sums.mean(width) + a.eps);
    const vf factors = roots * roots * sums_of_products.mean(width);
    for (int k = 0; k < rows.count; ++k) {
      const float r = roots[k], c = factors[k];
      for_blocks(0, width, [&](int64_t at, int64_t n) {
        const float* x = load_at(a.x, rows.x[k] + at, n, buffers[0]);
        const float* dy = load_at(a.dy, rows.dy[k] + at, n, buffers[1]);
        const Out dx = open_block(a.dx, 0, rows.y[k] + at, buffers[2]);
        for_vectors(n, [&](auto lane, int64_t i) {
          using F = decltype(lane);
          const F v = load<F>(x + i);
          put<F>(dx, i, (scaled(lane, dy, at, i) - v * c) * r);
          if (dweight) {
            float* sum = dweight + at + i;
            store<F>(sum, fma(load<F>(dy + i), v * r, load<F>(sum)));
          }
        });
        close_block(a.dx, 0, rows.y[k] + at, n, buffers[2]);
      });
    }
  });
}

static void rms_norm_backward(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = group * kRowGroup, rows = a.sizes.rows();
    const int64_t last = row + kRowGroup < rows ? row + kRowGroup : rows;
    float* dweight = a.dweight ? a.dweight + group * a.sizes.width : nullptr;
    (a.weight ? normalise_backward<true> : normalise_backward<false>)(a, row, last, dweight);
  }
}

extern const RotaryTable rotary_table = {rotary_embedding, rms_norm, rms_norm_backward};

}  // namespace GM_ISA
}  // namespace gm
