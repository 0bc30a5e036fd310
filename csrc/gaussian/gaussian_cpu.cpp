#include "common/block.h"
#include "gaussian/gaussian.h"

namespace gm {
namespace GM_ISA {

// eps of a block: given, made from the key, or nothing at all where z plays no part.
static inline const float* eps_block(const GaussianArgs& a, bool wanted, int64_t row, int64_t at,
                                     int64_t n, Buffer& buffer) {
  if (!wanted) return nullptr;
  if (a.eps.data) return load_block(a.eps, row, at, n, buffer);
  return normal_block(a.key, row, at, n, buffer);
}

template <bool kPrior, bool kSample>
static double forward_block(const GaussianArgs& a, int64_t row, int64_t at, int64_t n) {
  Buffer buffers[6];
  const float* m = load_block(a.mean, row, at, n, buffers[0]);
  const float* l = load_block(a.logvar, row, at, n, buffers[1]);
  const float* eps = eps_block(a, kSample, row, at, n, buffers[2]);
  const float* prior_m = kPrior ? load_block(a.prior_mean, row, at, n, buffers[3]) : m;
  const float* prior_l = kPrior ? load_block(a.prior_logvar, row, at, n, buffers[4]) : l;
  const Out z = open_block(a.z, row, at, buffers[5]);
  BlockSum sum;
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    F sigma;
    const F mean = load<F>(m + i);
    sum.add(kl_term<kPrior>(mean, clamp(load<F>(l + i), a.low, a.high), load<F>(prior_m + i),
                            load<F>(prior_l + i), sigma));
    if constexpr (kSample) put<F>(z, i, fma(sigma, load<F>(eps + i), mean));
  });
  if (kSample) close_block(a.z, row, at, n, buffers[5]);
  return sum.total();
}

template <bool kPrior, bool kSample>
static void forward_tasks(const GaussianArgs& a, double* sums, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    double sum = 0.0;
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      sum += forward_block<kPrior, kSample>(a, row, at, count);
    });
    sums[task] = sum;
  });
}

static void forward(const GaussianArgs& a, double* sums, int64_t begin, int64_t end) {
  if (a.z.data) {
    a.has_prior() ? forward_tasks<true, true>(a, sums, begin, end)
                  : forward_tasks<false, true>(a, sums, begin, end);
  } else {
    a.has_prior() ? forward_tasks<true, false>(a, sums, begin, end)
                  : forward_tasks<false, false>(a, sums, begin, end);
  }
}

template <bool kPrior, bool kSample>
static void backward_block(const GaussianArgs& a, int64_t row, int64_t at, int64_t n) {
  static const Buffer zeros{};
  Buffer buffers[12];
  const float* m = load_block(a.mean, row, at, n, buffers[0]);
  const float* l = load_block(a.logvar, row, at, n, buffers[1]);
  const float* eps = kSample ? eps_block(a, true, row, at, n, buffers[2]) : zeros.data;
  const float* prior_m = kPrior ? load_block(a.prior_mean, row, at, n, buffers[3]) : m;
  const float* prior_l = kPrior ? load_block(a.prior_logvar, row, at, n, buffers[4]) : l;
  const float* dz = kSample ? load_block(a.dz, row, at, n, buffers[5]) : zeros.data;
  const float* dkl = a.dkl.data ? load_block(a.dkl, row, at, n, buffers[6]) : zeros.data;
  const Result* results[5] = {&a.dmean, &a.dlogvar, &a.dprior_mean, &a.dprior_logvar, &a.deps};
  Out out[5];
  for (int j = 0; j < 5; ++j) out[j] = open_block(*results[j], row, at, buffers[7 + j]);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    const auto g = gaussian_gradients<kPrior, kSample>(
        load<F>(m + i), load<F>(l + i), load<F>(prior_m + i), load<F>(prior_l + i),
        load<F>(eps + i), load<F>(dz + i), load<F>(dkl + i) * a.dkl_scale, a.low, a.high);
    put<F>(out[0], i, g.dmean);
    put<F>(out[1], i, g.dlogvar);
    if constexpr (kPrior) put<F>(out[2], i, g.dprior_mean);
    if constexpr (kPrior) put<F>(out[3], i, g.dprior_logvar);
    if (a.deps.data) put<F>(out[4], i, g.deps);
  });
  for (int j = 0; j < 5; ++j) close_block(*results[j], row, at, n, buffers[7 + j]);
}

template <bool kPrior, bool kSample>
static void backward_tasks(const GaussianArgs& a, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      backward_block<kPrior, kSample>(a, row, at, count);
    });
  });
}

static void backward(const GaussianArgs& a, int64_t begin, int64_t end) {
  if (a.dz.data) {
    a.has_prior() ? backward_tasks<true, true>(a, begin, end)
                  : backward_tasks<false, true>(a, begin, end);
  } else {
    a.has_prior() ? backward_tasks<true, false>(a, begin, end)
                  : backward_tasks<false, false>(a, begin, end);
  }
}

template <bool kPrior>
static void per_dim_tasks(const GaussianArgs& a, double* partial, int64_t begin, int64_t end) {
  const int64_t blocks = (a.columns + kBlock - 1) / kBlock;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slab = task / blocks, at = task % blocks * kBlock;
    const int64_t n = a.columns - at < kBlock ? a.columns - at : kBlock;
    const int64_t last = (slab + 1) * kSlab < a.rows ? (slab + 1) * kSlab : a.rows;
    Buffer buffers[4], sums{};
    for (int64_t row = slab * kSlab; row < last; ++row) {
      const float* m = load_block(a.mean, row, at, n, buffers[0]);
      const float* l = load_block(a.logvar, row, at, n, buffers[1]);
      const float* prior_m = kPrior ? load_block(a.prior_mean, row, at, n, buffers[2]) : m;
      const float* prior_l = kPrior ? load_block(a.prior_logvar, row, at, n, buffers[3]) : l;
      for_vectors(n, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        F sigma;
        const F term = kl_term<kPrior>(load<F>(m + i), clamp(load<F>(l + i), a.low, a.high),
                                       load<F>(prior_m + i), load<F>(prior_l + i), sigma);
        store<F>(sums.data + i, load<F>(sums.data + i) + term);
      });
    }
    for (int64_t i = 0; i < n; ++i) partial[slab * a.columns + at + i] = sums.data[i];
  }
}

static void per_dim(const GaussianArgs& a, double* partial, int64_t begin, int64_t end) {
  a.has_prior() ? per_dim_tasks<true>(a, partial, begin, end)
                : per_dim_tasks<false>(a, partial, begin, end);
}

extern const GaussianTable gaussian_table = {forward, backward, per_dim};

}  // namespace GM_ISA
}  // namespace gm
