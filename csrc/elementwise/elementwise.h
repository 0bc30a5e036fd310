// Elementwise maps of a flow: actnorm, leaky, logit, their inverses and gradients; dequantisation.
// Derivations stand in gmkernels/ops/elementwise/reference.py; the names are the same there and
// here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"

namespace gm {

// actnorm cuts [rows, columns] into tasks of kGroup rows by kWidth columns, whose tables of
// parameters stay in the first-level cache; the cut follows from the shape alone.
constexpr int64_t kGroup = 32;
constexpr int64_t kWidth = 2048;

inline int64_t cut(int64_t n, int64_t by) { return (n + by - 1) / by; }

// One call on rows [B, columns] = [B, C P].
struct ActnormArgs {
  Operand x;           // the call's input: x, or y of the inverse
  const float* shift;  // [columns], the shift of each column's channel
  const float* scale;  // [columns], exp(l), of the inverse exp(-l)
  int64_t rows, columns;
  bool inverse;
  // Forward.
  Result y;
  // Backward.
  Operand dy;  // absent: 0
  Result dx;
  // float [groups of rows, columns], both or neither: sums over each group of g, and of g times
  // what the scale multiplies.
  float* sum_g = nullptr;
  float* sum_gx = nullptr;

  int64_t groups() const { return cut(rows, kGroup); }
  int64_t tasks() const { return groups() * cut(columns, kWidth); }
};

enum class Kind : int32_t { leaky, logit };

// One call on rows [B, columns].
struct PointwiseArgs {
  Operand x;  // the call's input: x, or y of the inverse
  int64_t columns;
  Kind kind;
  bool inverse;
  float parameter;  // slope (of the inverse 1 / slope) or alpha
  float m;          // 1 - 2 alpha, of the inverse 1 / (1 - 2 alpha)
  Result y;
  Operand dy, dlog_det;  // [B, columns], [B]; absent: 0
  Result dx;
};

// levels [B, columns], contiguous.
struct DequantizeArgs {
  const void* levels;
  DType dtype;     // u8, i32 or i64
  const float* u;  // [B, columns], contiguous, or null: made from the key
  NoiseKey key;
  int64_t columns;
  float factor, low, high;  // 1 / bins, and what keeps x inside its level
  Result x;
};

struct ElementwiseTable {
  void (*actnorm)(const ActnormArgs& args, int64_t begin, int64_t end);
  void (*actnorm_backward)(const ActnormArgs& args, int64_t begin, int64_t end);
  // sums [tasks]: elements below 0 for leaky, else the sum of -log p q, of the inverse of log p q.
  void (*pointwise)(const PointwiseArgs& args, double* sums, int64_t begin, int64_t end);
  void (*pointwise_backward)(const PointwiseArgs& args, int64_t begin, int64_t end);
  void (*dequantize)(const DequantizeArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(ElementwiseTable, elementwise_table)

namespace GM_ISA {

template <class F>
struct Mapped {
  F y;
  F term;  // of the sum that log_det is made of
};

// exp(-|y|), and 1 / (1 + exp(-|y|)), from which p and q = 1 - p come without cancellation.
template <class F>
struct Halves {
  F e, r;
};

template <class F>
GM_HD Halves<F> halves(F y) {
  const F e = exp(select(y < 0.0f, y, -y));
  return {e, 1.0f / (e + 1.0f)};
}

template <Kind kKind, bool kInverse, class F>
GM_HD Mapped<F> pointwise_map(F x, float parameter, float m) {
  if constexpr (kKind == Kind::leaky) {
    const auto below = x < 0.0f;
    return {select(below, x * parameter, x), select(below, splat<F>(1.0f), splat<F>(0.0f))};
  } else if constexpr (kInverse) {
    const Halves<F> a = halves(x);
    const F p = select(x < 0.0f, a.e * a.r, a.r);
    const F magnitude = select(x < 0.0f, -x, x);
    return {(p - parameter) * m, fma(log1p_unit(a.e), splat<F>(-2.0f), -magnitude)};
  } else {
    const F log_p = log(fma(x, splat<F>(m), splat<F>(parameter)));
    const F log_q = log(fma(1.0f - x, splat<F>(m), splat<F>(parameter)));
    return {log_p - log_q, -(log_p + log_q)};
  }
}

// g: gradient of the output; l: of log_det.
template <Kind kKind, bool kInverse, class F>
GM_HD F pointwise_gradient(F x, F g, F l, float parameter, float m) {
  if constexpr (kKind == Kind::leaky) {
    return select(x < 0.0f, g * parameter, g);
  } else if constexpr (kInverse) {
    const Halves<F> a = halves(x);
    const F gap = (1.0f - a.e) * a.r;  // |p - q|
    return fma(g * (a.e * a.r * a.r), splat<F>(m), l * select(x < 0.0f, gap, -gap));
  } else {
    const F p = fma(x, splat<F>(m), splat<F>(parameter));
    const F q = fma(1.0f - x, splat<F>(m), splat<F>(parameter));
    return m / (p * q) * fma(l, p - q, g);
  }
}

}  // namespace GM_ISA
}  // namespace gm
