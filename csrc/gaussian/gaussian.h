// Diagonal Gaussians: reparameterized samples, KL divergences, their gradients. Derivations stand
// in gmkernels/ops/gaussian/reference.py; the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"

namespace gm {

// One call on rows [B, D]. Absent operands have null data: an absent prior is N(0, I), an absent
// eps is made from the key.
struct GaussianArgs {
  Operand mean, logvar, prior_mean, prior_logvar, eps;
  NoiseKey key;
  const int64_t* key_ptr =
      nullptr;      // CUDA: int64 [2] on the device, replaces key's seed and offset
  float low, high;  // logvar is clamped to [low, high]
  int64_t rows, columns;
  // Forward.
  Result z;                  // null for gaussian_kl
  float* kl = nullptr;       // [B], nats; written by CUDA, on the CPU by sum_rows() from the sums
  float* partial = nullptr;  // CUDA: [B, chunks] scratch where a row has more than one chunk
  // Backward. dkl is one value a row (stride 0), or one a column (row_stride 0) for the means over
  // B.
  Operand dz, dkl;
  float dkl_scale = 1.0f;
  Result dmean, dlogvar, dprior_mean, dprior_logvar, deps;

  bool has_prior() const { return prior_mean.data || prior_logvar.data; }
};

constexpr int64_t kSlab = 256;  // rows that one task of gaussian_kl_per_dim sums

struct GaussianTable {
  // sums [tasks]: twice the KL of each chunk.
  void (*forward)(const GaussianArgs& args, double* sums, int64_t begin, int64_t end);
  void (*backward)(const GaussianArgs& args, int64_t begin, int64_t end);
  // partial [slabs, D]: sums over the rows of each slab.
  void (*per_dim)(const GaussianArgs& args, double* partial, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(GaussianTable, gaussian_table)

// CUDA launchers; stream is a cudaStream_t. backward serves gaussian_kl too (dz null).
void gaussian_forward_cuda(const GaussianArgs& args, void* stream);
void gaussian_backward_cuda(const GaussianArgs& args, void* stream);

namespace GM_ISA {

// NaN passes through, as its gradient does.
template <class F>
GM_HD F clamp(F x, float low, float high) {
  return min_keeping_nan(max_keeping_nan(x, low), high);
}

// expm1(l) - l and sigma = exp(l / 2) from one exponential. With E = exp(h) = 1 + h + c, h = l / 2:
// E^2 - 1 - l = h^2 + c (2 + 2 h + c), which does not cancel; used where E needs no power of two.
template <class F>
GM_HD F excess_and_sigma(F l, F& sigma) {
  const F h = l * 0.5f;
  const ExpParts<F> e = exp_parts(h);
  sigma = scale_by_power(1.0f + e.tail, e.n);
  const F near = fma(h, h, e.excess * (fma(h, splat<F>(2.0f), splat<F>(2.0f)) + e.excess));
  const F far = fma(sigma, sigma, -1.0f - l);
  return select(e.n == 0.0f, near, far);
}

// Twice the KL of one element; sigma comes for free. l is clamped already.
template <bool kPrior, class F>
GM_HD F kl_term(F m, F l, F prior_m, F prior_l, F& sigma) {
  if constexpr (kPrior) {
    sigma = exp(l * 0.5f);
    F ratio, excess;
    exp_and_excess(l - prior_l, ratio, excess);
    const F shift = m - prior_m;
    return fma(shift * shift, exp(-prior_l), excess);
  } else {
    return fma(m, m, excess_and_sigma(l, sigma));
  }
}

template <class F>
struct GaussianGradients {
  F dmean, dlogvar, dprior_mean, dprior_logvar, deps;
};

// logvar is the raw one: outside [low, high] its gradient is 0.
template <bool kPrior, bool kSample, class F>
GM_HD GaussianGradients<F> gaussian_gradients(F m, F logvar, F prior_m, F prior_l, F eps, F dz,
                                              F dkl, float low, float high) {
  const F l = clamp(logvar, low, high);
  const F zero = splat<F>(0.0f);
  GaussianGradients<F> g;
  F sigma, expm1;
  if constexpr (kPrior) {
    sigma = exp(l * 0.5f);
    F ratio, excess;
    const F d = l - prior_l;
    exp_and_excess(d, ratio, excess);
    expm1 = excess + d;
    const F shift = m - prior_m;
    const F slope = shift * exp(-prior_l);
    g.dmean = fma(dkl, slope, dz);
    g.dprior_mean = -(dkl * slope);
    g.dprior_logvar = dkl * -0.5f * fma(shift, slope, expm1);
  } else {
    expm1 = excess_and_sigma(l, sigma) + l;
    g.dmean = fma(dkl, m, dz);
    g.dprior_mean = g.dprior_logvar = zero;
  }
  F dl = dkl * expm1;
  g.deps = zero;
  if constexpr (kSample) {  // else an infinite sigma must not meet dz = 0
    g.deps = dz * sigma;
    dl = fma(g.deps, eps, dl);
  }
  dl = dl * 0.5f;
  g.dlogvar = select(logvar < low, zero, select(logvar > high, zero, dl));
  return g;
}

}  // namespace GM_ISA
}  // namespace gm
