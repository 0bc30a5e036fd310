// kLanes elements of a spline at a time on the CPU: their parameters transposed into vectors, the
// bin of each found, gradients transposed back.
#pragma once

#include "common/block.h"
#include "spline/spline.h"

namespace gm {
namespace GM_ISA {

// Lanes are elements: kLanes rows of parameters are transposed, then every step is a vector. One
// element's steps are a chain longer than what a core looks ahead: kGroup vectors take each step
// before any takes the next, so that it finds independent work.
constexpr int kGroup = 4;
constexpr int kMaxParameters = 3 * kMaxBins - 1;

// Of kLanes elements: widths, heights, derivatives. kBins: 0 stands for any number.
template <int kBins>
struct Parameters {
  vf raw[3][kBins ? kBins : kMaxBins];
};

// count columns of kLanes rows of floats, `stride` apart; four at a time, the last four may
// overlap.
static inline void load_columns(const float* p, int64_t stride, int count, vf* x) {
  int c = 0;
#pragma GCC unroll 8
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
[[gnu::noinline]] static void load_any_segment(const SplineArgs& a, int j, int count, int64_t row,
                                               int64_t slot, int64_t n, vf* x) {
  const Operand& raw = a.raw[j];
  const int64_t at = row * raw.row_stride + slot * a.step[j];
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
// Lines of n floats, to the second-level cache: the first one would lose them again to what lies
// between. The steps are too many for the core to look so far itself.
static inline void prefetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(float)) __builtin_prefetch(p + i, 0, 2);
}

static inline void load_segment(const SplineArgs& a, int j, int count, int64_t row, int64_t slot,
                                int64_t n, vf* x) {
  const Operand& raw = a.raw[j];
  if (raw.dtype != DType::f32 || n < kLanes) {
    vf any[kMaxBins];  // copied: what a call has written would not be kept in registers
    load_any_segment(a, j, count, row, slot, n, any);
#pragma GCC unroll 8
    for (int k = 0; k < count; ++k) x[k] = any[k];
    return;
  }
  const float* p = (const float*)raw.data + row * raw.row_stride + slot * a.step[j];
  // Of the group after the next. AVX-512 asks for a third of what the segments share with each of
  // them; AVX2 is a tenth slower by that.
  const int64_t all = kLanes * a.step[j];
  const float* later = p + 2 * kGroup * all;
  if (!a.joint) {
    prefetch(later, all);
  } else if (kLanes == 16) {
    prefetch(later + j * (all / 3), all / 3);
  } else if (j == 0) {
    prefetch(later, all);
  }
  load_columns(p, a.step[j], count, x);
}

static void store_segment(const SplineArgs& a, int j, int count, int64_t row, int64_t slot,
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

// Gradients of all parameters of n elements, segments of one float32 tensor, that were put together
// in the first-level cache: what goes past the caches must go there in whole lines.
static inline void store_joint(const SplineArgs& a, int64_t row, int64_t slot, int64_t n,
                               const float* rows) {
  const int64_t step = a.step[0];
  float* out = (float*)a.draw[0].data + row * a.draw[0].row_stride + slot * step;
  if (a.draw[0].streaming && (uintptr_t)out % 64 == 0 && n * step % kLanes == 0) {
    for (int64_t i = 0; i < n * step; i += kLanes) stream(out + i, load<vf>(rows + i));
  } else {
    memcpy(out, rows, n * step * sizeof(float));
  }
}

// What all elements of a call share.
struct Shape {
  int bins;
  Axis axis[2];
  float bound, min_derivative, end_derivative;
};

// bins: that of the call, as a constant where it is one.
static inline Shape shape_of(const SplineArgs& a, int bins) {
  return {bins,
          {axis_of(bins, a.min_width), axis_of(bins, a.min_height)},
          a.bound,
          a.min_derivative,
          a.end_derivative};
}

// 2^x for x <= 0 to 2 ulp. Vectors of AVX-512 look 2^(i / 32) up: fewer products, which are what a
// loop of exponentials waits for.
#if defined(__AVX512F__)
// x = floor(x) + i / 32 + f, 0 <= f < 1 / 32; i is in the low bits of 1.5 2^18 + x rounded down.
static inline vf exp2_softmax(vf x) {
  alignas(64) static constexpr float kPowers[32] = {
      1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
      1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
      1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
      1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
      1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512i i = (__m512i)_mm512_add_round_ps((__m512)x, _mm512_set1_ps(0x1.8p18f), kDown);
  const vf power =
      (vf)_mm512_permutex2var_ps(_mm512_load_ps(kPowers), i, _mm512_load_ps(kPowers + 16));
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 5 << 4 | kDown);  // 0 of -inf
  const vf p = fma(f, splat<vf>(0.24266938865184784f), splat<vf>(0.6931232810020447f));
  return scale_by_power(fma(power * f, p, power), x);  // which takes floor(x)
}
#else
static inline vf exp2_softmax(vf x) { return exp2_nonpositive(x); }
#endif

// exp(raw - max) in place of raw; gives their sum. Far below the sum, where exp2's argument has
// lost digits, an error does not count.
static inline vf exponentials(vf* raw, int bins) {
  vf top = raw[0];
#pragma GCC unroll 8
  for (int k = 1; k < bins; ++k) top = select(raw[k] > top, raw[k], top);
  vf sum = vf{};
#pragma GCC unroll 8
  for (int k = 0; k < bins; ++k) {
    raw[k] = exp2_softmax((raw[k] - top) * 1.44269504088896341f);
    sum += raw[k];
  }
  return sum;
}

// The bin of an element: what its parameters hold of it.
struct Found {
  vf number;     // k
  vf raw[2];     // unnormalised slopes at its ends
  vf sum[2];     // of all exponentials, of widths and of heights
  vf over[2];    // 1 / sum
  vf before[2];  // of the exponentials of the bins before
  vf chosen[2];  // that of this bin
};

// The bin that holds `at`. Leaves the exponentials in p.raw[0] and p.raw[1].
template <bool kInverse, int kBins>
static inline Found find_bin(const Shape& s, vf at, Parameters<kBins>& p) {
  Found f;
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    f.sum[j] = exponentials(p.raw[j], s.bins);
    f.over[j] = 1.0f / f.sum[j];
    f.before[j] = vf{};
    f.chosen[j] = p.raw[j][0];
  }
  f.raw[0] = splat<vf>(s.end_derivative);
  f.raw[1] = p.raw[2][0];
  f.number = vf{};
  // Edges for the search alone: the bin's own are computed more carefully below.
  constexpr int kAlong = kInverse ? 1 : 0;
  const vf floor = splat<vf>(2.0f * s.bound * s.axis[kAlong].minimum);
  const vf unit = 2.0f * s.bound * s.axis[kAlong].rest * f.over[kAlong];
  vf edge = splat<vf>(-s.bound);
#pragma GCC unroll 8
  for (int k = 1; k < s.bins; ++k) {
    edge += fma(unit, p.raw[kAlong][k - 1], floor);
    const vi above = at >= edge;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      f.before[j] = select(above, f.before[j] + p.raw[j][k - 1], f.before[j]);
      f.chosen[j] = select(above, p.raw[j][k], f.chosen[j]);
    }
    f.raw[0] = select(above, p.raw[2][k - 1], f.raw[0]);
    f.raw[1] = select(above, k + 1 < s.bins ? p.raw[2][k] : splat<vf>(s.end_derivative), f.raw[1]);
    f.number = select(above, splat<vf>((float)k), f.number);
  }
  return f;
}

// Sizes, corners and slopes of a bin, and the derivatives of the slopes by what they come from.
static inline Bin<vf> bin_of(const Shape& s, const Found& f, vf sigmoid[2]) {
  Bin<vf> b;
  b.w = size_of(s.axis[0], f.chosen[0], f.sum[0], f.over[0], s.bound);
  b.h = size_of(s.axis[1], f.chosen[1], f.sum[1], f.over[1], s.bound);
  b.d0 = softplus(f.raw[0], sigmoid[0]) + s.min_derivative;
  b.d1 = softplus(f.raw[1], sigmoid[1]) + s.min_derivative;
  vf edges[2][2];
  const vf next = f.number + 1.0f;
  for (int j = 0; j < 2; ++j) {
    edges[j][0] = edge_of(s.axis[j], f.number, f.before[j], f.sum[j], f.over[j], s.bins, s.bound);
    const vf before = f.before[j] + f.chosen[j];
    edges[j][1] = edge_of(s.axis[j], next, before, f.sum[j], f.over[j], s.bins, s.bound);
  }
  b.left = edges[0][0], b.right = edges[0][1];
  b.low = edges[1][0], b.high = edges[1][1];
  return b;
}

}  // namespace GM_ISA
}  // namespace gm
