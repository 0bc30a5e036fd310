// Affine coupling: y_2 = s x_2 + shift, its inverse, log-determinant and gradients. Derivations
// stand in gmkernels/ops/coupling/reference.py; the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"
#include "common/slots.h"

namespace gm {

enum class Scale : int32_t { additive, exp, tanh, sigmoid };

// One call on rows [B, columns], part of each transformed.
struct CouplingArgs : Slots {
  Operand x;           // the call's input: x, or y of the inverse
  Operand shift, raw;  // [B, part]; raw is absent for additive
  int64_t rows, columns;
  Scale scale;
  float clamp;  // bound of |log s| for tanh
  bool inverse;
  // Forward.
  Result y;
  float* log_det = nullptr;  // [B]; written by CUDA, on the CPU by sum_rows() from the sums
  float* partial = nullptr;  // CUDA: [B, chunks] scratch where a row has more than one chunk
  // Backward.
  Operand dy, dlog_det;  // [B, columns], [B]; absent: 0
  Result dx, dshift, draw;

  float sign() const { return inverse ? -1.0f : 1.0f; }
};

struct CouplingTable {
  // sums [tasks]: sum of log s over the slots of each chunk.
  void (*forward)(const CouplingArgs& args, double* sums, int64_t begin, int64_t end);
  void (*backward)(const CouplingArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(CouplingTable, coupling_table)

// CUDA launchers; stream is a cudaStream_t.
void coupling_forward_cuda(const CouplingArgs& args, void* stream);
void coupling_backward_cuda(const CouplingArgs& args, void* stream);

namespace GM_ISA {

template <class F>
struct Scaling {
  F log_s;
  F s;      // of the inverse: 1 / s
  F slope;  // d log s / du
};

template <Scale kScale, bool kInverse, class F>
GM_HD Scaling<F> scaling(F u, float clamp, float inverse_clamp) {
  const F one = splat<F>(1.0f);
  if constexpr (kScale == Scale::additive) {
    return {splat<F>(0.0f), one, splat<F>(0.0f)};
  } else if constexpr (kScale == Scale::exp) {
    return {u, exp(kInverse ? -u : u), one};
  } else if constexpr (kScale == Scale::tanh) {
    const F t = tanh(u * inverse_clamp);
    const F log_s = t * clamp;
    return {log_s, exp(kInverse ? -log_s : log_s), fma(-t, t, one)};
  } else {
    const F v = u + 2.0f;
    const auto below = v < 0.0f;
    const F e = exp(select(below, v, -v));  // exp(-|v|)
    const F log_s = select(below, v, splat<F>(0.0f)) - log1p_unit(e);
    const F r = quotient(splat<F>(1.0f), e + 1.0f);
    const F s = select(below, e * r, r), slope = select(below, r, e * r);
    if constexpr (kInverse) return {log_s, select(below, 1.0f / e, e) + 1.0f, slope};
    return {log_s, s, slope};
  }
}

template <bool kInverse, class F>
GM_HD F mapped(F x, F shift, F s) {
  if constexpr (kInverse) return (x - shift) * s;
  return fma(x, s, shift);
}

template <class F>
struct CouplingGradients {
  F dx, dshift, draw;
};

// g: gradient of the transformed output; l: of log_det.
template <Scale kScale, bool kInverse, class F>
GM_HD CouplingGradients<F> coupling_gradients(F x, F shift, F u, F g, F l, float clamp,
                                              float inverse_clamp) {
  const Scaling<F> a = scaling<kScale, kInverse>(u, clamp, inverse_clamp);
  const F dx = g * a.s;
  if constexpr (kInverse) return {dx, -dx, -(a.slope * fma(g, (x - shift) * a.s, l))};
  return {dx, g, a.slope * fma(dx, x, l)};
}

}  // namespace GM_ISA
}  // namespace gm
