// Monotonic rational-quadratic splines with linear tails, forward and inverse. Derivations stand in
// gmkernels/ops/spline/reference.py; the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"
#include "common/slots.h"

namespace gm {

constexpr int kMinBins = 4, kMaxBins = 32;

// One call on rows [B, columns], part of each mapped.
struct SplineArgs : Slots {
  Operand x;        // the call's input: x, or y of the inverse
  Operand raw[3];   // [B, part, *] unnormalised widths, heights, derivatives
  int64_t step[3];  // elements from one slot's parameters to the next's
  bool joint;       // the three are segments of one tensor, and so are their gradients
  int64_t rows, columns;
  int32_t bins;
  float bound;
  float min_width, min_height, min_derivative;
  float end_derivative;  // the raw derivative whose value is 1
  bool inverse;
  // Forward.
  Result y;
  float* log_det = nullptr;  // [B]; written by CUDA, on the CPU by sum_rows() from the sums
  float* partial = nullptr;  // CUDA: [B, chunks] scratch where a row has more than one chunk
  // Backward.
  Operand dy, dlog_det;  // [B, columns], [B]; absent: 0
  Result dx, draw[3];    // draw: laid out as raw, step apart
};

struct SplineTable {
  // sums [tasks]: sum of log det over the slots of each chunk.
  void (*forward)(const SplineArgs& args, double* sums, int64_t begin, int64_t end);
  void (*backward)(const SplineArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(SplineTable, spline_table)

// CUDA launchers; stream is a cudaStream_t.
void spline_forward_cuda(const SplineArgs& args, void* stream);
void spline_backward_cuda(const SplineArgs& args, void* stream);

namespace GM_ISA {

// A bin: its sizes, its corners (left, low) and (right, high), the slopes at its ends.
template <class F>
struct Bin {
  F w, h, left, low, right, high, d0, d1;
};

// One axis: K exponentials of sum S share what the smallest sizes leave of [-bound, bound].
struct Axis {
  float minimum, rest;  // of 1, for each bin; and for all by share
};

GM_HD Axis axis_of(int bins, float minimum) {
  return {minimum, (float)(1.0 - (double)bins * minimum)};
}

// x / sum, rounded as a quotient, with over = 1 / sum at hand.
template <class F>
GM_HD F share_of(F x, F sum, F over) {
  const F share = x * over;
  return fma(fma(-share, sum, x), over, share);
}

template <class F>
GM_HD F size_of(const Axis& axis, F exponential, F sum, F over, float bound) {
  const F share = share_of(exponential, sum, over);
  return fma(share, splat<F>(axis.rest), splat<F>(axis.minimum)) * (2.0f * bound);
}

// Where bin k starts, `before` the sum of the exponentials of the bins before it: measured from the
// nearer end, where less is rounded.
template <class F>
GM_HD F edge_of(const Axis& axis, F k, F before, F sum, F over, int bins, float bound) {
  const F after = sum - before;
  const auto right = before > after;
  const F share = share_of(select(right, after, before), sum, over);
  const F count = select(right, (float)bins - k, k);
  const F part = fma(share, splat<F>(axis.rest), count * axis.minimum);
  return fma(part, select(right, splat<F>(-2.0f * bound), splat<F>(2.0f * bound)),
             select(right, splat<F>(bound), splat<F>(-bound)));
}

// log(1 + exp(v)) and its derivative, sigmoid(v).
template <class F>
GM_HD F softplus(F v, F& sigmoid) {
  const auto below = v < 0.0f;
  const F e = exp(select(below, v, -v)), r = 1.0f / (e + 1.0f);
  sigmoid = select(below, e * r, r);
  return select(below, splat<F>(0.0f), v) + log1p_unit(e);
}

// What a point of a bin fixes. The curve seen from the upper corner has the same form with d_k and
// d_{k+1} swapped, and a point is measured from one of the two: where the curve is flat at its ends
// from the nearer one; where it is flat in the middle from the flatter one, since a map and its
// inverse must not change corners there.
template <class F>
struct Point {
  F z, c;         // position in the bin, in [0, 1], and 1 - z
  F s, m, t;      // h / w; d_k + d_{k+1} - 2 s; z c
  F e;            // E
  F over_d;       // 1 / D
  F ratio, rest;  // N / D = (y - Y_k) / h, and 1 - N / D
  F image;        // y, or x of the inverse
};

// at: x, or y of the inverse, inside [-bound, bound]. b.d0 and b.d1 are the slopes themselves.
template <bool kInverse, class F>
GM_HD Point<F> point_of(F at, const Bin<F>& b) {
  Point<F> p;
  p.s = b.h / b.w;
  p.m = fma(p.s, splat<F>(-2.0f), b.d0 + b.d1);
  const F above = at - (kInverse ? b.low : b.left), below = (kInverse ? b.high : b.right) - at;
  const auto flat_ends = p.m < 0.0f;
  const auto upper = select(flat_ends, below, b.d1) < select(flat_ends, above, b.d0);
  const F near = max_keeping_nan(select(upper, below, above), 0.0f);
  F z;  // from the corner
  if constexpr (kInverse) {
    const F d = select(upper, b.d1, b.d0), r = near / b.h;
    const F q = fma(-r, p.m, d), sr = p.s * r, rise = fma(r, p.m, p.s - d);
    const F square = fma(sr * 4.0f, rise, q * q);
    const F root = sqrt_ieee(max_keeping_nan(square, 0.0f));
    const auto falls = q < 0.0f;  // then q + root would cancel
    z = select(falls, root - q, sr + sr) /
        max_keeping_nan(select(falls, rise + rise, q + root), 1e-37f);
  } else {
    z = near / b.w;
  }
  z = min_keeping_nan(z, 1.0f);
  const F far = 1.0f - z;
  p.z = select(upper, far, z);
  p.c = select(upper, z, far);
  p.t = z * far;
  p.over_d = 1.0f / fma(p.m, p.t, p.s);
  p.ratio = fma(p.s * p.z, p.z, b.d0 * p.t) * p.over_d;
  p.rest = fma(p.s * p.c, p.c, b.d1 * p.t) * p.over_d;
  p.e = fma(b.d1 * p.z, p.z, fma(p.s + p.s, p.t, b.d0 * p.c * p.c));
  if constexpr (kInverse) {
    p.image = select(upper, fma(-z, b.w, b.right), fma(z, b.w, b.left));
  } else {
    p.image = select(upper, fma(-p.rest, b.h, b.high), fma(p.ratio, b.h, b.low));
  }
  return p;
}

// log dy/dx of the forward map at the point.
template <class F>
GM_HD F log_slope(const Point<F>& p) {
  const F a = p.s * p.over_d;
  return log(a * a * p.e);
}

// Gradients of g y + l log det at a point of the forward map: of x, the bin's sizes and corner, and
// its slopes.
template <class F>
struct BinGradients {
  F dx, dw, dh, dleft, dlow, dd0, dd1;
};

// For the inverse, g and l are those of its own output and log det; dx is then that of its input.
template <bool kInverse, class F>
GM_HD BinGradients<F> bin_gradients(const Point<F>& p, const Bin<F>& b, F g, F l) {
  const F two = splat<F>(2.0f), c = p.c - p.z;            // 1 - 2 z
  const F u = fma(p.t, splat<F>(-2.0f), splat<F>(1.0f));  // 1 - 2 t
  const F over_e = 1.0f / p.e, over_w = 1.0f / b.w;
  const F hd = b.h * p.over_d;
  const F y_z = hd * p.s * p.e * p.over_d;
  const F inner = fma(b.d1, p.z, fma(p.s, c, -(b.d0 * p.c)));
  const F l_z = two * fma(inner, over_e, -(p.m * c * p.over_d));
  const F given = g;
  if constexpr (kInverse) {  // dy = (g - l L_x) / f; the parameters see g' = -dy, l' = -l
    l = -l;
    g = -(fma(l, l_z * over_w, g) / (y_z * over_w));
  }
  const F te = p.t * over_e, td = p.t * p.over_d;
  const F y_s = hd * fma(p.z, p.z, -(p.ratio * u));
  const F l_s = two * (1.0f / p.s + te - u * p.over_d);
  const F g_s = fma(g, y_s, l * l_s);
  // Of the inverse g' y_z + l' l_z is -given w: written so, it does not cancel.
  const F g_z = kInverse ? -(given * b.w) : fma(g, y_z, l * l_z);
  BinGradients<F> d;
  d.dleft = kInverse ? given : -(g_z * over_w);
  d.dx = kInverse ? -g : g_z * over_w;
  d.dw = -(over_w * fma(p.z, g_z, p.s * g_s));
  d.dh = fma(g, p.ratio, g_s * over_w);
  d.dlow = g;
  d.dd0 = fma(g, hd * p.t * p.rest, l * fma(p.c * p.c, over_e, td * -2.0f));
  d.dd1 = fma(g, -(hd * p.t * p.ratio), l * fma(p.z * p.z, over_e, td * -2.0f));
  return d;
}

}  // namespace GM_ISA
}  // namespace gm
