#include "common/block.h"
#include "diffusion_noise/diffusion_noise.h"

namespace gm {
namespace GM_ISA {

// eps of a block: given or made from the key.
static inline const float* eps_block(const DiffusionNoiseArgs& a, int64_t row, int64_t at,
                                     int64_t n, Buffer& buffer) {
  if (a.eps.data) return load_block(a.eps, row, at, n, buffer);
  return normal_block(a.key, row, at, n, buffer);
}

// Runs body(task, row, levels, at, count) for the blocks of tasks [begin, end).
template <class Body>
static inline void for_level_blocks(const DiffusionNoiseArgs& a, int64_t begin, int64_t end,
                                    Body body) {
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    const RowLevels levels = read_levels(a.levels, a.prediction, row);
    for_blocks(start, n, [&](int64_t at, int64_t count) { body(task, row, levels, at, count); });
  });
}

template <bool kTarget, bool kX0, bool kEps>
static void noise_tasks(const DiffusionNoiseArgs& a, int64_t begin, int64_t end) {
  for_level_blocks(a, begin, end, [&](int64_t, int64_t row, RowLevels r, int64_t at, int64_t n) {
    Buffer buffers[4];
    const float* x = load_block(a.x0, row, at, n, buffers[0]);
    const float* eps = eps_block(a, row, at, n, buffers[1]);
    const Out x_t = open_block(a.x_t, row, at, buffers[2]);
    const Out target = open_block(a.target, row, at, buffers[3]);
    for_vectors(n, [&](auto lane, int64_t i) {
      using F = decltype(lane);
      const F x0 = load<F>(x + i), e = load<F>(eps + i);
      put<F>(x_t, i, mix(r.a, x0, r.s, e));
      if constexpr (kTarget) {
        put<F>(target, i, kX0 && kEps ? mix(r.p, x0, r.q, e) : kX0 ? x0 : e);
      }
    });
    close_block(a.x_t, row, at, n, buffers[2]);
    if (kTarget) close_block(a.target, row, at, n, buffers[3]);
  });
}

static void noise(const DiffusionNoiseArgs& a, int64_t begin, int64_t end) {
  if (!a.target.data) return noise_tasks<false, false, false>(a, begin, end);
  if (a.prediction == Prediction::epsilon) return noise_tasks<true, false, true>(a, begin, end);
  if (a.prediction == Prediction::sample) return noise_tasks<true, true, false>(a, begin, end);
  noise_tasks<true, true, true>(a, begin, end);
}

// Writes one gradient, by_first first + by_second second, of those that are there.
static inline void write_gradient(const Result& result, int64_t row, int64_t at, int64_t n,
                                  float by_first, const float* first, float by_second = 0.0f,
                                  const float* second = nullptr) {
  if (!result.data) return;
  Buffer buffer;
  const Out out = open_block(result, row, at, buffer);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    F sum{};
    if (first) sum = load<F>(first + i) * by_first;
    if (second) sum = fma(splat<F>(by_second), load<F>(second + i), sum);
    put<F>(out, i, sum);
  });
  close_block(result, row, at, n, buffer);
}

static void noise_backward(const DiffusionNoiseArgs& a, int64_t begin, int64_t end) {
  for_level_blocks(a, begin, end, [&](int64_t, int64_t row, RowLevels r, int64_t at, int64_t n) {
    Buffer buffers[2];
    const float* dx_t = a.dx_t.data ? load_block(a.dx_t, row, at, n, buffers[0]) : nullptr;
    const float* dtarget = a.dtarget.data ? load_block(a.dtarget, row, at, n, buffers[1]) : nullptr;
    const float* by_x0 = reads_x0(a.prediction) ? dtarget : nullptr;
    const float* by_eps = reads_eps(a.prediction) ? dtarget : nullptr;
    write_gradient(a.dx0, row, at, n, r.a, dx_t, r.p, by_x0);
    write_gradient(a.deps, row, at, n, r.s, dx_t, r.q, by_eps);
  });
}

template <bool kX0, bool kEps>
static void loss_tasks(const DiffusionNoiseArgs& a, double* sums, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) sums[task] = 0.0;
  for_level_blocks(a, begin, end,
                   [&](int64_t task, int64_t row, RowLevels r, int64_t at, int64_t n) {
                     Buffer buffers[4];
                     const float* predicted = load_block(a.predicted, row, at, n, buffers[0]);
                     const float* x = kX0 ? load_block(a.x0, row, at, n, buffers[1]) : predicted;
                     const float* eps = kEps ? eps_block(a, row, at, n, buffers[2]) : predicted;
                     const Out residual = open_block(a.residual, row, at, buffers[3]);
                     BlockSum sum;
                     for_vectors(n, [&](auto lane, int64_t i) {
                       using F = decltype(lane);
                       const F x0 = load<F>(x + i), e = load<F>(eps + i);
                       const F gap = load<F>(predicted + i) - (kX0 && kEps ? mix(r.p, x0, r.q, e)
                                                               : kX0       ? x0
                                                                           : e);
                       sum.add(gap * gap);
                       if (a.residual.data) put<F>(residual, i, gap);
                     });
                     close_block(a.residual, row, at, n, buffers[3]);
                     sums[task] += sum.total();
                   });
}

static void loss(const DiffusionNoiseArgs& a, double* sums, int64_t begin, int64_t end) {
  if (a.prediction == Prediction::epsilon) return loss_tasks<false, true>(a, sums, begin, end);
  if (a.prediction == Prediction::sample) return loss_tasks<true, false>(a, sums, begin, end);
  loss_tasks<true, true>(a, sums, begin, end);
}

static void loss_backward(const DiffusionNoiseArgs& a, int64_t begin, int64_t end) {
  for_level_blocks(a, begin, end, [&](int64_t, int64_t row, RowLevels r, int64_t at, int64_t n) {
    Buffer buffers[2];
    const float c = 2.0f * r.w * *load_block(a.dloss, row, at, 1, buffers[0]) / (float)a.columns;
    const float* residual = load_block(a.kept, row, at, n, buffers[1]);
    const float* by_x0 = reads_x0(a.prediction) ? residual : nullptr;
    const float* by_eps = reads_eps(a.prediction) ? residual : nullptr;
    write_gradient(a.dpredicted, row, at, n, c, residual);
    write_gradient(a.dx0, row, at, n, -r.p * c, by_x0);
    write_gradient(a.deps, row, at, n, -r.q * c, by_eps);
  });
}

extern const DiffusionNoiseTable diffusion_noise_table = {noise, noise_backward, loss,
                                                          loss_backward};

}  // namespace GM_ISA
}  // namespace gm
