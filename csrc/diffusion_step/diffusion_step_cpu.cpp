#include <algorithm>
#include <cmath>
#include <vector>

#include "common/block.h"
#include "diffusion_step/diffusion_step.h"

namespace gm {
namespace GM_ISA {

// p of a block: the prediction itself, or both combined in the buffer.
static inline const float* prediction_block(const DiffusionStepArgs& a, int64_t row, int64_t at,
                                            int64_t n, Buffer& buffer) {
  const float* c = load_block(a.predicted, row, at, n, buffer);
  if (!a.unconditional.data) return c;
  Buffer other;
  const float* u = load_block(a.unconditional, row, at, n, other);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    store<F>(buffer.data + i, guided(load<F>(c + i), load<F>(u + i), a.guidance));
  });
  return buffer.data;
}

// The threshold of each row: order statistics of |x0| on both sides of the quantile.
static void threshold(const DiffusionStepArgs& a, int64_t begin, int64_t end) {
  std::vector<float> sizes(a.columns);
  for (int64_t row = begin; row < end; ++row) {
    if (a.columns == 0) {
      a.h[row] = 1.0f;
      continue;
    }
    const StepCoefficients r = read_step(a.steps, row);
    bool has_nan = false;
    for_blocks(0, a.columns, [&](int64_t at, int64_t n) {
      Buffer buffers[2];
      const float* x = load_block(a.x, row, at, n, buffers[0]);
      const float* p = prediction_block(a, row, at, n, buffers[1]);
      for (int64_t i = 0; i < n; ++i) {
        const float size = std::fabs(mix(r.A, x[i], r.B, p[i]));
        sizes[at + i] = size;
        has_nan |= size != size;
      }
    });
    const double place = a.ratio * (double)(a.columns - 1);
    const int64_t below = (int64_t)place;
    float h = __builtin_nanf("");
    if (!has_nan) {
      std::nth_element(sizes.begin(), sizes.begin() + below, sizes.end());
      constexpr float kLargest = 0x1.fffffep127f;  // what infinity counts as
      const float low = std::min(sizes[below], kLargest);
      const bool last = below + 1 >= a.columns;
      const float next = last ? low : *std::min_element(sizes.begin() + below + 1, sizes.end());
      const float high = std::min(next, kLargest);
      h = low + (float)(place - (double)below) * (high - low);
      h = std::min(std::max(h, 1.0f), a.clip);
    }
    a.h[row] = h;
  }
}

// What a row's x0 is clamped to, and what it is multiplied by then.
struct Range {
  float h, by_h;
};

static inline Range range_of(const DiffusionStepArgs& a, int64_t row) {
  if (a.ratio > 0) return {a.h[row], 1.0f / a.h[row]};
  return {a.clip, 1.0f};
}

// y += by * x
static inline void accumulate(int64_t n, float by, const float* x, float* y) {
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    store<F>(y + i, fma(splat<F>(by), load<F>(x + i), load<F>(y + i)));
  });
}

static inline const float* noise_block(const DiffusionStepArgs& a, const NoiseKey& key, int64_t row,
                                       int64_t at, int64_t n, Buffer& buffer) {
  if (a.eps.data) return load_block(a.eps, row, at, n, buffer);
  return normal_block(key, row, at, n, buffer);
}

// s exp(low + (v + 1) / 2 (high - low))
template <class F>
static inline F learned_scale(const StepCoefficients& r, F v) {
  const float half = 0.5f * (r.high - r.low);
  return exp(fma(splat<F>(half), v, splat<F>(r.low + half))) * r.s;
}

// Adds m previous and the noise to y, which holds the rest of the sum, and writes x'.
static void finish(const DiffusionStepArgs& a, const StepCoefficients& r, const NoiseKey& key,
                   int64_t row, int64_t at, int64_t n, float* y) {
  Buffer buffers[3];
  if (a.previous.data) accumulate(n, r.m, load_block(a.previous, row, at, n, buffers[0]), y);
  const float* eps = a.noisy ? noise_block(a, key, row, at, n, buffers[1]) : y;
  const float* v = a.variance.data ? load_block(a.variance, row, at, n, buffers[2]) : nullptr;
  Buffer converted;
  const Out out = open_block(a.x_next, row, at, converted);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    F sum = load<F>(y + i);
    if (a.noisy) {
      const F s = v ? learned_scale(r, load<F>(v + i)) : splat<F>(r.s);
      sum = fma(s, load<F>(eps + i), sum);
    }
    put<F>(out, i, sum);
  });
  close_block(a.x_next, row, at, n, converted);
}

// What a step adds to its sum of x, x0 and p: nothing, noise of one scale, or anything.
enum class More { nothing, noise, anything };

template <bool kClip, More kMore>
static void forward_block(const DiffusionStepArgs& a, const StepCoefficients& r, const Range& range,
                          const NoiseKey& key, int64_t row, int64_t at, int64_t n) {
  Buffer buffers[5];
  const float* x = load_block(a.x, row, at, n, buffers[0]);
  const float* p = prediction_block(a, row, at, n, buffers[1]);
  constexpr bool kNoise = kMore == More::noise;
  const float* eps = kNoise ? noise_block(a, key, row, at, n, buffers[4]) : x;
  const Out denoised = open_block(a.denoised, row, at, buffers[2]);
  // The sum so far where finish() has more to add, else x'.
  const Out y = kMore == More::anything ? Out{buffers[3].data, false}
                                        : open_block(a.x_next, row, at, buffers[3]);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    const F xi = load<F>(x + i), pi = load<F>(p + i);
    F sum;
    if constexpr (kClip) {
      const F x0 = clamped(mix(r.A, xi, r.B, pi), range.h, range.by_h);
      sum = fma(splat<F>(r.f), x0, mix(r.e, xi, r.k, pi));
      if (a.denoised.data) put<F>(denoised, i, x0);
    } else {
      sum = mix(r.x_direct, xi, r.p_direct, pi);
      if (a.denoised.data) put<F>(denoised, i, mix(r.A, xi, r.B, pi));
    }
    if constexpr (kNoise) sum = fma(splat<F>(r.s), load<F>(eps + i), sum);
    put<F>(y, i, sum);
  });
  close_block(a.denoised, row, at, n, buffers[2]);
  if constexpr (kMore == More::anything) {
    finish(a, r, key, row, at, n, buffers[3].data);
  } else {
    close_block(a.x_next, row, at, n, buffers[3]);
  }
}

// Runs body(row, coefficients, range, key of the row, at, count) over blocks.
template <class Body>
static inline void for_step_blocks(const DiffusionStepArgs& a, int64_t begin, int64_t end,
                                   Body body) {
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    const StepCoefficients r = read_step(a.steps, row);
    const Range range = range_of(a, row);
    const NoiseKey key = fold_key(a.key, step_index(a.steps, row));
    for_blocks(start, n, [&](int64_t at, int64_t count) { body(row, r, range, key, at, count); });
  });
}

template <bool kClip, More kMore>
static void forward_tasks(const DiffusionStepArgs& a, int64_t begin, int64_t end) {
  for_step_blocks(
      a, begin, end,
      [&](int64_t row, const StepCoefficients& r, const Range& range, const NoiseKey& key,
          int64_t at, int64_t n) { forward_block<kClip, kMore>(a, r, range, key, row, at, n); });
}

template <bool kClip>
static void forward_clip(const DiffusionStepArgs& a, int64_t begin, int64_t end) {
  if (a.previous.data || a.variance.data) {
    return forward_tasks<kClip, More::anything>(a, begin, end);
  }
  a.noisy ? forward_tasks<kClip, More::noise>(a, begin, end)
          : forward_tasks<kClip, More::nothing>(a, begin, end);
}

static void forward(const DiffusionStepArgs& a, int64_t begin, int64_t end) {
  a.clips() ? forward_clip<true>(a, begin, end) : forward_clip<false>(a, begin, end);
}

// result = by x
static inline void write_scaled(const Result& result, int64_t row, int64_t at, int64_t n, float by,
                                const float* x) {
  if (!result.data) return;
  Buffer buffer;
  const Out out = open_block(result, row, at, buffer);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    put<F>(out, i, load<F>(x + i) * by);
  });
  close_block(result, row, at, n, buffer);
}

// dx and dp, the latter as float32 for what follows.
template <bool kClip>
static void chain_block(const DiffusionStepArgs& a, const StepCoefficients& r, const Range& range,
                        int64_t row, int64_t at, int64_t n, const float* dy, const float* dx0c,
                        float* dp) {
  Buffer buffers[3];
  const float* x = kClip ? load_block(a.x, row, at, n, buffers[0]) : dy;
  const float* p = kClip ? prediction_block(a, row, at, n, buffers[1]) : dy;
  const Out dx = open_block(a.dx, row, at, buffers[2]);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    const F g = load<F>(dy + i), g0 = load<F>(dx0c + i);
    F by_x, by_p;
    if constexpr (kClip) {
      const F x0 = mix(r.A, load<F>(x + i), r.B, load<F>(p + i));
      const F inner = fma(splat<F>(r.f), g, g0) * range.by_h, zero = splat<F>(0.0f);
      const F dx0 = select(x0 < -range.h, zero, select(x0 > range.h, zero, inner));
      by_x = mix(r.e, g, r.A, dx0), by_p = mix(r.k, g, r.B, dx0);
    } else {
      by_x = mix(r.x_direct, g, r.A, g0), by_p = mix(r.p_direct, g, r.B, g0);
    }
    if (a.dx.data) put<F>(dx, i, by_x);
    store<F>(dp + i, by_p);
  });
  close_block(a.dx, row, at, n, buffers[2]);
}

// dn and dv from dy.
static void noise_gradients(const DiffusionStepArgs& a, const StepCoefficients& r,
                            const NoiseKey& key, int64_t row, int64_t at, int64_t n,
                            const float* dy) {
  if (!a.variance.data) return write_scaled(a.deps, row, at, n, r.s, dy);
  Buffer buffers[4];
  const float* v = load_block(a.variance, row, at, n, buffers[0]);
  const float* eps = a.dvariance.data ? noise_block(a, key, row, at, n, buffers[1]) : dy;
  const Out dv = open_block(a.dvariance, row, at, buffers[2]);
  const Out deps = open_block(a.deps, row, at, buffers[3]);
  const float half = 0.5f * (r.high - r.low);
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    const F scaled = load<F>(dy + i) * learned_scale(r, load<F>(v + i));
    if (a.deps.data) put<F>(deps, i, scaled);
    if (a.dvariance.data) put<F>(dv, i, scaled * load<F>(eps + i) * half);
  });
  close_block(a.dvariance, row, at, n, buffers[2]);
  close_block(a.deps, row, at, n, buffers[3]);
}

static void backward(const DiffusionStepArgs& a, int64_t begin, int64_t end) {
  for_step_blocks(a, begin, end,
                  [&](int64_t row, const StepCoefficients& r, const Range& range,
                      const NoiseKey& key, int64_t at, int64_t n) {
                    Buffer buffers[3];
                    const float* dy = load_block(a.dx_next, row, at, n, buffers[0]);
                    const float* dx0c = load_block(a.ddenoised, row, at, n, buffers[1]);
                    float* dp = buffers[2].data;
                    if (a.clips()) {
                      chain_block<true>(a, r, range, row, at, n, dy, dx0c, dp);
                    } else {
                      chain_block<false>(a, r, range, row, at, n, dy, dx0c, dp);
                    }
                    write_scaled(a.dpredicted, row, at, n, a.unconditional.data ? a.guidance : 1.0f,
                                 dp);
                    write_scaled(a.dunconditional, row, at, n, 1.0f - a.guidance, dp);
                    write_scaled(a.dprevious, row, at, n, r.m, dy);
                    if (a.noisy && (a.deps.data || a.dvariance.data))
                      noise_gradients(a, r, key, row, at, n, dy);
                  });
}

extern const DiffusionStepTable diffusion_step_table = {threshold, forward, backward};

}  // namespace GM_ISA
}  // namespace gm
