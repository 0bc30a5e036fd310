// Negative log-likelihoods summed over a row, and their gradients. Derivations stand in
// gmkernels/ops/likelihood/reference.py; the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"

namespace gm {

// One call on rows [B, D]. x and mean or logits as the op names them; dnll is one value a row.
struct LikelihoodArgs {
  Operand x, mean, logvar;  // mean: logits for bernoulli; logvar absent: unit variance
  Operand dnll;
  Result dx, dmean, dlogvar;
  int64_t rows, columns;
};

// levels [B, D] of L levels, logits [B, D, L] contiguous within a row.
struct CategoricalArgs {
  const void* levels;
  DType levels_dtype;  // i64, i32 or u8
  int64_t levels_row_stride;
  Operand logits;
  Operand dnll;
  Result dlogits;
  int64_t rows, columns, size;
};

// forward and categorical write sums [tasks]; gaussian_backward writes there the gradient of a
// logvar that is one value a row, where sums is not null.
struct LikelihoodTable {
  void (*gaussian)(const LikelihoodArgs& args, double* sums, int64_t begin, int64_t end);
  void (*gaussian_backward)(const LikelihoodArgs& args, double* sums, int64_t begin, int64_t end);
  void (*bernoulli)(const LikelihoodArgs& args, double* sums, int64_t begin, int64_t end);
  void (*bernoulli_backward)(const LikelihoodArgs& args, int64_t begin, int64_t end);
  void (*categorical)(const CategoricalArgs& args, double* sums, int64_t begin, int64_t end);
  void (*categorical_backward)(const CategoricalArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(LikelihoodTable, likelihood_table)

namespace GM_ISA {

// log(1 + exp(s)) - s x for x in [0, 1], as |s| f + log1p(exp(-|s|)) with f the weight of the wrong
// side; f = 0 wins over an infinite logit.
template <class F>
GM_HD F bernoulli_term(F x, F s) {
  const F magnitude = select(s < 0.0f, -s, s);
  const F f = select(s > 0.0f, 1.0f - x, x);
  const F far = select(f == 0.0f, splat<F>(0.0f), magnitude * f);
  return select(s != s, s, far + log1p_unit(exp(-magnitude)));
}

// sigmoid(s) without overflow.
template <class F>
GM_HD F sigmoid(F s) {
  const F e = exp(select(s < 0.0f, s, -s));
  return select(s < 0.0f, e, splat<F>(1.0f)) / (1.0f + e);
}

}  // namespace GM_ISA
}  // namespace gm
