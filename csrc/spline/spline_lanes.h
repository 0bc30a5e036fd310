// kLanes elements of a spline at a time on the CPU: their parameters transposed into vectors, the
// bin of each found, gradients transposed back.
#pragma once

#include "common/block.h"
#include "spline/spline.h"

namespace gm {
namespace GM_ISA {

// Lanes are elements: kLanes rows of parameters are transposed, then every step is a vector.
constexpr int kMaxParameters = 3 * kMaxBins - 1;

struct Parameters {
  vf raw[3][kMaxBins];  // of kLanes elements: widths, heights, derivatives
};

// count columns of kLanes rows of floats, `stride` apart; four at a time, the last four may
// overlap.
static inline void load_columns(const float* p, int64_t stride, int count, vf* x) {
  int c = 0;
  for (; c + 4 <= count; c += 4) load_columns4(p + c, stride, x + c);
  if (c == count) return;
  if (count >= 4) return load_columns4(p + count - 4, stride, x + count - 4);
  for (; c < count; ++c)
    for (int i = 0; i < kLanes; ++i) x[c][i] = p[i * stride + c];
}
static inline void store_columns(float* p, int64_t stride, int count, const vf* x) {
  int c = 0;
  for (; c + 4 <= count; c += 4) store_columns4(p + c, stride, x[c], x[c + 1], x[c + 2], x[c + 3]);
  if (c == count) return;
  if (count >= 4) {
    c = count - 4;
    return store_columns4(p + c, stride, x[c], x[c + 1], x[c + 2], x[c + 3]);
  }
  for (; c < count; ++c)
    for (int i = 0; i < kLanes; ++i) p[i * stride + c] = x[c][i];
}

// Segment j of the parameters of slots [slot, slot + n), n <= kLanes; the lanes beyond repeat the
// first element.
static inline void load_segment(const SplineArgs& a, int j, int count, int64_t row, int64_t slot,
                                int64_t n, vf* x) {
  const Operand& raw = a.raw[j];
  const int64_t at = row * raw.row_stride + slot * a.step[j];
  if (raw.dtype == DType::f32 && n == kLanes) {
    return load_columns((const float*)raw.data + at, a.step[j], count, x);
  }
  float rows[kLanes][kMaxBins];
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t from = at + (i < n ? i : 0) * a.step[j];
    if (raw.dtype == DType::f32) {
      memcpy(rows[i], (const float*)raw.data + from, count * sizeof(float));
    } else {
      const uint16_t* in = (const uint16_t*)raw.data + from;
      const bool is_bf16 = raw.dtype == DType::bf16;
      for (int c = 0; c < count; ++c) rows[i][c] = is_bf16 ? from_bf16(in[c]) : from_f16(in[c]);
    }
  }
  load_columns(rows[0], kMaxBins, count, x);
}

static inline void store_segment(const SplineArgs& a, int j, int count, int64_t row, int64_t slot,
                                 int64_t n, const vf* x) {
  const Result& draw = a.draw[j];
  if (!draw.data) return;
  const int64_t at = row * draw.row_stride + slot * a.step[j];
  if (draw.dtype == DType::f32 && n == kLanes) {
    return store_columns((float*)draw.data + at, a.step[j], count, x);
  }
  float rows[kLanes][kMaxBins];
  store_columns(rows[0], kMaxBins, count, x);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t to = at + i * a.step[j];
    if (draw.dtype == DType::f32) {
      memcpy((float*)draw.data + to, rows[i], count * sizeof(float));
    } else {
      uint16_t* out = (uint16_t*)draw.data + to;
      const bool is_bf16 = draw.dtype == DType::bf16;
      for (int c = 0; c < count; ++c) out[c] = is_bf16 ? to_bf16(rows[i][c]) : to_f16(rows[i][c]);
    }
  }
}

// The gradients of all parameters of kLanes elements, segments of one float32 tensor: put together
// in the first-level cache, since what goes past the caches must go there in whole lines.
static inline void store_joint(const SplineArgs& a, int bins, int64_t row, int64_t slot,
                               const Parameters& p) {
  alignas(64) float rows[kLanes * kMaxParameters];
  const int64_t step = a.step[0];
  for (int j = 0; j < 3; ++j) store_columns(rows + j * bins, step, bins - (j == 2), p.raw[j]);
  float* out = (float*)a.draw[0].data + row * a.draw[0].row_stride + slot * step;
  if (a.draw[0].streaming && (uintptr_t)out % 64 == 0) {
    for (int64_t i = 0; i < kLanes * step; i += kLanes) stream(out + i, load<vf>(rows + i));
  } else {
    memcpy(out, rows, kLanes * step * sizeof(float));
  }
}

// exp(raw - max) in place of raw; gives their sum. Far below the sum, where exp2's argument has
// lost digits, an error does not count. The bound is for -inf.
static inline vf exponentials(vf* raw, int bins) {
  vf top = raw[0];
  for (int k = 1; k < bins; ++k) top = select(raw[k] > top, raw[k], top);
  vf sum = vf{};
  for (int k = 0; k < bins; ++k) {
    const vf power = (raw[k] - top) * 1.44269504088896341f;
    raw[k] = exp2_nonpositive(max_keeping_nan(power, -150.0f));
    sum += raw[k];
  }
  return sum;
}

struct Found {
  Bin<vf> bin;
  vi number;      // k
  vf raw[2];      // unnormalised slopes at its ends
  vf sigmoid[2];  // of these
  vf sum[2];      // of all exponentials, of widths and of heights
  vf over[2];     // 1 / sum
  vf before[2];   // of the exponentials of the bins before
  vf chosen[2];   // that of this bin
  Axis axis[2];
};

// The bin that holds `at`. Leaves the exponentials in p.raw[0] and p.raw[1].
template <bool kInverse>
static inline Found find_bin(const SplineArgs& a, int bins, vf at, Parameters& p) {
  Found f;
  const float minima[2] = {a.min_width, a.min_height};
  for (int j = 0; j < 2; ++j) {
    f.sum[j] = exponentials(p.raw[j], bins);
    f.over[j] = 1.0f / f.sum[j];
    f.axis[j] = axis_of(bins, minima[j]);
    f.before[j] = vf{};
    f.chosen[j] = p.raw[j][0];
  }
  f.raw[0] = splat<vf>(a.end_derivative);
  f.raw[1] = p.raw[2][0];
  f.number = vi{};
  // Edges for the search alone: the bin's own are computed more carefully below.
  constexpr int kAlong = kInverse ? 1 : 0;
  const float floor = 2.0f * a.bound * f.axis[kAlong].minimum;
  const vf unit = 2.0f * a.bound * f.axis[kAlong].rest * f.over[kAlong];
  vf sum[2] = {vf{}, vf{}}, start = splat<vf>(-a.bound);
  for (int k = 1; k < bins; ++k) {
    for (int j = 0; j < 2; ++j) sum[j] += p.raw[j][k - 1];
    start += floor;
    const vi above = at >= fma(unit, sum[kAlong], start);
    for (int j = 0; j < 2; ++j) {
      f.before[j] = select(above, sum[j], f.before[j]);
      f.chosen[j] = select(above, p.raw[j][k], f.chosen[j]);
    }
    f.raw[0] = select(above, p.raw[2][k - 1], f.raw[0]);
    f.raw[1] = select(above, k + 1 < bins ? p.raw[2][k] : splat<vf>(a.end_derivative), f.raw[1]);
    f.number -= above;
  }
  Bin<vf>& b = f.bin;
  b.w = size_of(f.axis[0], f.chosen[0], f.sum[0], f.over[0], a.bound);
  b.h = size_of(f.axis[1], f.chosen[1], f.sum[1], f.over[1], a.bound);
  b.d0 = softplus(f.raw[0], f.sigmoid[0]) + a.min_derivative;
  b.d1 = softplus(f.raw[1], f.sigmoid[1]) + a.min_derivative;
  vf edges[2][2];
  const vf k = to_float(f.number), next = k + 1.0f;
  for (int j = 0; j < 2; ++j) {
    edges[j][0] = edge_of(f.axis[j], k, f.before[j], f.sum[j], f.over[j], bins, a.bound);
    const vf before = f.before[j] + f.chosen[j];
    edges[j][1] = edge_of(f.axis[j], next, before, f.sum[j], f.over[j], bins, a.bound);
  }
  b.left = edges[0][0], b.right = edges[0][1];
  b.low = edges[1][0], b.high = edges[1][1];
  return f;
}

}  // namespace GM_ISA
}  // namespace gm
