// GELU in its tanh form, x sigmoid(u(x)), and its gradient. The derivation stands in
// gmkernels/ops/activation/reference.py; the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"

namespace gm {

constexpr float kLinear = 1.5957691216057308f;  // u = x (kLinear + kCubic x^2)
constexpr float kCubic = 0.07135481282639584f;
constexpr float kFar = 1e3f;  // beyond it the gradient is 0 or 1

// One call on rows [B, columns].
struct GeluArgs {
  Operand x;
  int64_t columns;
  Result y;
  Operand dy;
  Result dx;
};

struct ActivationTable {
  void (*gelu)(const GeluArgs& args, int64_t begin, int64_t end);
  void (*gelu_backward)(const GeluArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(ActivationTable, activation_table)

namespace GM_ISA {

// exp(-|u|), and the numerator of sigmoid(u) over 1 + exp(-|u|).
template <class F>
struct Gate {
  F e, s;
};

template <class F>
GM_HD Gate<F> gate(F x) {
  const F u = x * fma(x * x, splat<F>(kCubic), splat<F>(kLinear));
  const auto below = u < 0.0f;
  const F e = exp(select(below, u, -u));
  return {e, select(below, e, splat<F>(1.0f))};
}

template <class F>
GM_HD F gelu(F x) {
  const Gate<F> a = gate(x);
  return x * a.s / (a.e + 1.0f);
}

template <class F>
GM_HD F gelu_gradient(F x) {
  const F low = select(x < -kFar, splat<F>(-kFar), x);
  const F v = select(low > kFar, splat<F>(kFar), low);
  const Gate<F> a = gate(v);
  const F r = 1.0f / (a.e + 1.0f);
  const F slope = v * fma(v * v, splat<F>(3.0f * kCubic), splat<F>(kLinear));
  return fma(slope * a.e, r * r, a.s * r);
}

}  // namespace GM_ISA
}  // namespace gm
