#include <initializer_list>
#include <type_traits>

#include "common/slot_blocks.h"
#include "spline/spline_lanes.h"

namespace gm {
namespace GM_ISA {

static inline vf load_lanes(const float* p, int64_t n) {
  if (n == kLanes) return load<vf>(p);
  vf x = vf{};
  memcpy(&x, p, n * sizeof(float));
  return x;
}

static inline void put_lanes(const Out& y, int64_t i, vf x, int64_t n) {
  if (n == kLanes) return put<vf>(y, i, x);
  memcpy(y.data + i, &x, n * sizeof(float));
}

// body(g, i, count) for the vectors g of a group: elements [i, i + count).
template <class Body>
static inline void for_group(int64_t begin, int64_t n, Body body) {
  const int64_t end = n - begin < kGroup * kLanes ? n : begin + kGroup * kLanes;
  int g = 0;
  for (int64_t i = begin; i < end; i += kLanes) body(g++, i, end - i < kLanes ? end - i : kLanes);
}

static inline vi inside_of(const SplineArgs& a, vf at) {
  return (at >= -a.bound) & (at <= a.bound);
}

// n elements whose parameters start at (row, slot): y and log_det of each.
template <int kBins, bool kInverse>
static void forward_elements(const SplineArgs& a, int64_t row, int64_t slot, int64_t n,
                             const float* x, const Out& y, float* log_det) {
  const Shape shape = shape_of(a, kBins ? kBins : a.bins);
  vf held[kGroup];
  Found found[kGroup];
  Bin<vf> bins[kGroup];
  for (int64_t begin = 0; begin < n; begin += kGroup * kLanes) {
    for_group(begin, n, [&](int g, int64_t i, int64_t count) {
      Parameters<kBins> p;
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
        load_segment(a, j, shape.bins - (j == 2), row, slot + i, count, p.raw[j]);
      const vf at = load_lanes(x + i, count);
      held[g] = select(inside_of(a, at), at, vf{});
      found[g] = find_bin<kInverse>(shape, held[g], p);
    });
    for_group(begin, n, [&](int g, int64_t, int64_t) {
      vf sigmoid[2];
      bins[g] = bin_of(shape, found[g], sigmoid);
    });
    for_group(begin, n, [&](int g, int64_t i, int64_t count) {
      const Point<vf> point = point_of<kInverse>(held[g], bins[g]);
      const vf at = load_lanes(x + i, count);
      const vi inside = inside_of(a, at);
      put_lanes(y, i, select(inside, point.image, at), count);
      store<vf>(log_det + i, select(inside, log_slope(point), at != at ? at : vf{}));
    });
  }
}

// In place of the exponentials the gradients of raw sizes, from those of the bin's edge and size.
template <int kBins>
static inline void softmax_gradients(Parameters<kBins>& p, const Shape& s, const Found& f,
                                     const vf edges[2], const vf sizes[2]) {
  vf edge[2], size[2], mean[2];
  for (int j = 0; j < 2; ++j) {
    const vf scale = f.over[j] * (2.0f * s.bound * s.axis[j].rest);
    edge[j] = edges[j] * scale;
    size[j] = sizes[j] * scale;
    mean[j] = (edge[j] * f.before[j] + size[j] * f.chosen[j]) * f.over[j];
  }
  for (int k = 0; k < s.bins; ++k) {
    const vi before = f.number > (float)k, here = f.number == (float)k;
    for (int j = 0; j < 2; ++j) {
      const vf c = select(before, edge[j], select(here, size[j], vf{}));
      p.raw[j][k] = p.raw[j][k] * (c - mean[j]);
    }
  }
}

// The gradients of n elements whose parameters start at (row, slot); l: of each one's log det.
template <int kBins, bool kInverse>
static void backward_elements(const SplineArgs& a, int64_t row, int64_t slot, int64_t n,
                              const float* x, const float* dy, const float* dlog_det,
                              const Out& dx) {
  const Shape shape = shape_of(a, kBins ? kBins : a.bins);
  const bool joint = a.joint && a.draw[0].data && a.draw[0].dtype == DType::f32;
  Parameters<kBins> parameters[kGroup];
  vf held[kGroup], sigmoids[kGroup][2];
  Found found[kGroup];
  Bin<vf> bins[kGroup];
  BinGradients<vf> gradients[kGroup];
  alignas(64) float rows[kGroup * kLanes * kMaxParameters];
  for (int64_t begin = 0; begin < n; begin += kGroup * kLanes) {
    for_group(begin, n, [&](int g, int64_t i, int64_t count) {
      Parameters<kBins>& p = parameters[g];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
        load_segment(a, j, shape.bins - (j == 2), row, slot + i, count, p.raw[j]);
      const vf at = load_lanes(x + i, count);
      held[g] = select(inside_of(a, at), at, vf{});
      found[g] = find_bin<kInverse>(shape, held[g], p);
    });
    for_group(begin, n,
              [&](int g, int64_t, int64_t) { bins[g] = bin_of(shape, found[g], sigmoids[g]); });
    for_group(begin, n, [&](int g, int64_t i, int64_t count) {
      const vf at = load_lanes(x + i, count), of_y = load_lanes(dy + i, count);
      const vi inside = inside_of(a, at);
      const Point<vf> point = point_of<kInverse>(held[g], bins[g]);
      BinGradients<vf>& d = gradients[g];
      d = bin_gradients<kInverse>(point, bins[g], of_y, load_lanes(dlog_det + i, count));
      if (a.dx.data) put_lanes(dx, i, select(inside, d.dx, of_y), count);
      const vf nothing = at != at ? at : vf{};  // NaN stays, what is outside has no gradient
      for (vf* part : {&d.dw, &d.dh, &d.dleft, &d.dlow, &d.dd0, &d.dd1})
        *part = select(inside, *part, nothing);
    });
    for_group(begin, n, [&](int g, int64_t i, int64_t count) {
      Parameters<kBins>& p = parameters[g];
      const BinGradients<vf>& d = gradients[g];
      const Found& f = found[g];
      const vf edges[2] = {d.dleft, d.dlow}, sizes[2] = {d.dw, d.dh};
      softmax_gradients(p, shape, f, edges, sizes);
      const vf at = load_lanes(x + i, count), nothing = at != at ? at : vf{};
      const vf dd0 = d.dd0 * sigmoids[g][0], dd1 = d.dd1 * sigmoids[g][1];
      for (int k = 1; k < shape.bins; ++k) {
        p.raw[2][k - 1] =
            select(f.number == (float)k, dd0, select(f.number == (float)(k - 1), dd1, nothing));
      }
      for (int j = 0; j < 3; ++j) {
        const int size = shape.bins - (j == 2);
        if (joint) {
          float* out = rows + g * kLanes * a.step[0] + j * shape.bins;
          store_columns(out, a.step[0], size, p.raw[j]);
        } else {
          store_segment(a, j, size, row, slot + i, count, p.raw[j]);
        }
      }
    });
    const int64_t count = n - begin < kGroup * kLanes ? n - begin : kGroup * kLanes;
    if (joint) store_joint(a, row, slot + begin, count, rows);
  }
}

// Where rows are short and their parameters adjacent, lanes go on into the next row.
constexpr int64_t kShort = 4 * kLanes;

static inline bool spans_rows(const SplineArgs& a) {
  bool dense = a.part > 0 && a.part < kShort;
  for (int j = 0; j < 3; ++j) {
    dense = dense && a.raw[j].row_stride == a.part * a.step[j];
    dense = dense && (!a.draw[j].data || a.draw[j].row_stride == a.part * a.step[j]);
  }
  return dense;
}

// body(row, rows, n): groups of whole rows whose n = rows * part elements fit a block.
template <class Body>
static inline void for_groups(const SplineArgs& a, int64_t begin, int64_t end, Body body) {
  const int64_t most = kBlock / a.part;
  for (int64_t row = begin; row < end; row += most) {
    const int64_t rows = end - row < most ? end - row : most;
    body(row, rows, rows * a.part);
  }
  stream_fence();
}

static inline int64_t position_of(const SplineArgs& a, const int32_t* table, int64_t slot) {
  return table ? table[slot / a.inner] * a.inner + slot % a.inner : a.begin + slot;
}

// body(i, position) for the transformed elements of `rows` rows, one row after the other.
template <class Body>
static inline void for_row_slots(const SplineArgs& a, const int32_t* table, int64_t rows,
                                 Body body) {
  for (int64_t slot = 0; slot < a.part; ++slot) {
    const int64_t position = position_of(a, table, slot);
    for (int64_t r = 0; r < rows; ++r) body(r * a.part + slot, r, position);
  }
}

// The transformed elements of several rows: in place where nothing lies between, else gathered.
static const float* read_rows(const SplineArgs& a, const Operand& x, const int32_t* table,
                              int64_t row, int64_t rows, Buffer& buffer) {
  float* out = buffer.data;
  if (!x.data || (!table && x.row_stride == a.part)) {
    return load_block(x, row, a.begin, rows * a.part, buffer);
  }
  if (x.dtype == DType::f32) {
    const float* in = (const float*)x.data + row * x.row_stride;
    for_row_slots(a, table, rows, [&](int64_t i, int64_t r, int64_t position) {
      out[i] = in[r * x.row_stride + position];
    });
  } else {
    for_row_slots(a, table, rows, [&](int64_t i, int64_t r, int64_t position) {
      Buffer one;
      out[i] = *load_block(x, row + r, position, 1, one);
    });
  }
  return out;
}

// Where write_rows() is to find them.
static Out open_rows(const SplineArgs& a, const Result& y, const int32_t* table, int64_t row,
                     Buffer& buffer) {
  if (table || y.row_stride != a.part) return {buffer.data, false};
  return open_block(y, row, a.begin, buffer);
}

static void write_rows(const SplineArgs& a, const Result& y, const int32_t* table, int64_t row,
                       int64_t rows, const Buffer& buffer) {
  if (!y.data) return;
  if (!table && y.row_stride == a.part) {
    return close_block(y, row, a.begin, rows * a.part, buffer);
  }
  if (y.dtype == DType::f32) {
    float* out = (float*)y.data + row * y.row_stride;
    for_row_slots(a, table, rows, [&](int64_t i, int64_t r, int64_t position) {
      out[r * y.row_stride + position] = buffer.data[i];
    });
  } else {
    for_row_slots(a, table, rows, [&](int64_t i, int64_t r, int64_t position) {
      Buffer one;
      one.data[0] = buffer.data[i];
      close_block(y, row + r, position, 1, one);
    });
  }
}

// body(bins, is_inverse) as constants; 0 stands for any number of bins.
template <class Body>
static void with_kind(const SplineArgs& a, Body body) {
  const auto direction = [&](auto bins) {
    a.inverse ? body(bins, std::true_type{}) : body(bins, std::false_type{});
  };
  a.bins == 8 ? direction(std::integral_constant<int, 8>{})
              : direction(std::integral_constant<int, 0>{});
}

static inline double sum_of(const float* x, int64_t n) {
  BlockSum sum;
  for_vectors(n, [&](auto lane, int64_t i) { sum.add(load<decltype(lane)>(x + i)); });
  return sum.total();
}

template <int kBins, bool kInverse>
static void forward_tasks(const SplineArgs& a, double* sums, int64_t begin, int64_t end) {
  const auto pass_block = [&](int64_t row, int64_t slot, int64_t in_at, int64_t out_at, int64_t n) {
    pass(a.x, a.from, a.y, a.to, a.inner, row, slot, in_at, out_at, n);
  };
  Buffer log_det;
  if (spans_rows(a)) {
    return for_groups(a, begin, end, [&](int64_t row, int64_t rows, int64_t n) {
      Buffer buffers[2];
      const float* x = read_rows(a, a.x, a.from, row, rows, buffers[0]);
      const Out y = open_rows(a, a.y, a.to, row, buffers[1]);
      forward_elements<kBins, kInverse>(a, row, 0, n, x, y, log_det.data);
      write_rows(a, a.y, a.to, row, rows, buffers[1]);
      for (int64_t r = row; r < row + rows; ++r) {
        sums[r] = sum_of(log_det.data + (r - row) * a.part, a.part);
        for_runs(a, a.part, a.columns - a.part, [&](auto... block) { pass_block(r, block...); });
      }
    });
  }
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    double sum = 0.0;
    for_parts(
        a, start, n,
        [&](int64_t slot, int64_t in_at, int64_t out_at, int64_t count) {
          Buffer buffers[2];
          const float* x = read_slots(a.x, a.from, a.inner, row, slot, in_at, count, buffers[0]);
          const Out y = open_slots(a.y, row, out_at, buffers[1]);
          forward_elements<kBins, kInverse>(a, row, slot, count, x, y, log_det.data);
          close_slots(a.y, a.to, a.inner, row, slot, out_at, count, buffers[1]);
          sum += sum_of(log_det.data, count);
        },
        [&](auto... block) { pass_block(row, block...); });
    sums[task] = sum;
  });
}

template <int kBins, bool kInverse>
static void backward_tasks(const SplineArgs& a, int64_t begin, int64_t end) {
  const auto pass_block = [&](int64_t row, int64_t slot, int64_t in_at, int64_t out_at, int64_t n) {
    pass(a.dy, a.to, a.dx, a.from, a.inner, row, slot, out_at, in_at, n);
  };
  if (spans_rows(a)) {
    return for_groups(a, begin, end, [&](int64_t row, int64_t rows, int64_t n) {
      Buffer buffers[3], dlog_det, one;
      const float* x = read_rows(a, a.x, a.from, row, rows, buffers[0]);
      const float* dy = read_rows(a, a.dy, a.to, row, rows, buffers[1]);
      const Out dx = open_rows(a, a.dx, a.from, row, buffers[2]);
      for (int64_t r = 0; r < rows; ++r) {
        const float l = *load_block(a.dlog_det, row + r, 0, 1, one);
        for (int64_t i = 0; i < a.part; ++i) dlog_det.data[r * a.part + i] = l;
      }
      backward_elements<kBins, kInverse>(a, row, 0, n, x, dy, dlog_det.data, dx);
      write_rows(a, a.dx, a.from, row, rows, buffers[2]);
      for (int64_t r = row; r < row + rows; ++r)
        for_runs(a, a.part, a.columns - a.part, [&](auto... block) { pass_block(r, block...); });
    });
  }
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    for_parts(
        a, start, n,
        [&](int64_t slot, int64_t in_at, int64_t out_at, int64_t count) {
          Buffer buffers[4];
          const float* x = read_slots(a.x, a.from, a.inner, row, slot, in_at, count, buffers[0]);
          const float* dy = read_slots(a.dy, a.to, a.inner, row, slot, out_at, count, buffers[1]);
          const float* l = load_block(a.dlog_det, row, 0, count, buffers[2]);
          const Out dx = open_slots(a.dx, row, in_at, buffers[3]);
          backward_elements<kBins, kInverse>(a, row, slot, count, x, dy, l, dx);
          close_slots(a.dx, a.from, a.inner, row, slot, in_at, count, buffers[3]);
        },
        [&](auto... block) { pass_block(row, block...); });
  });
}

static void forward(const SplineArgs& a, double* sums, int64_t begin, int64_t end) {
  with_kind(a, [&](auto bins, auto inverse) {
    forward_tasks<bins.value, inverse.value>(a, sums, begin, end);
  });
}

static void backward(const SplineArgs& a, int64_t begin, int64_t end) {
  with_kind(a, [&](auto bins, auto inverse) {
    backward_tasks<bins.value, inverse.value>(a, begin, end);
  });
}

extern const SplineTable spline_table = {forward, backward};

}  // namespace GM_ISA
}  // namespace gm
