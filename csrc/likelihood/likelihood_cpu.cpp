#include "common/ahead.h"
#include "common/pack.h"
#include "likelihood/likelihood.h"

namespace gm {
namespace GM_ISA {

// How many rows ahead a call that writes next to nothing asks for.
static inline int64_t look_ahead(const LikelihoodArgs& a) {
  return rows_ahead(a.rows * a.columns * (int64_t)sizeof(float) >= kStreamBytes, a.columns);
}

template <bool kLogvar>
static void gaussian_tasks(const LikelihoodArgs& a, double* sums, int64_t begin, int64_t end) {
  const int64_t ahead = look_ahead(a);
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    double total = 0.0;
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer buffers[3];
      const float* x = load_block(a.x, row, at, count, buffers[0]);
      const float* m = load_block(a.mean, row, at, count, buffers[1]);
      const float* l = kLogvar ? load_block(a.logvar, row, at, count, buffers[2]) : x;
      const Ahead next_x(a.x, row + ahead, at), next_mean(a.mean, row + ahead, at);
      const Ahead next_logvar(kLogvar ? a.logvar : a.x, row + ahead, at);
      BlockSum sum;
      const auto body = [&](auto lane, int64_t i) __attribute__((always_inline)) {
        using F = decltype(lane);
        const F gap = load<F>(x + i) - load<F>(m + i);
        if constexpr (kLogvar) {
          const F logvar = load<F>(l + i);
          sum.add(fma(gap * gap, exp(-logvar), logvar));
        } else {
          sum.add(gap * gap);
        }
      };
      for_vectors_ahead(ahead, count, body, next_x, next_mean, next_logvar);
      total += sum.total();
    });
    sums[task] = total;
  });
}

static void gaussian(const LikelihoodArgs& a, double* sums, int64_t begin, int64_t end) {
  a.logvar.data ? gaussian_tasks<true>(a, sums, begin, end)
                : gaussian_tasks<false>(a, sums, begin, end);
}

static void gaussian_backward(const LikelihoodArgs& a, double* sums, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    double total = 0.0;
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer buffers[7];
      const float* x = load_block(a.x, row, at, count, buffers[0]);
      const float* m = load_block(a.mean, row, at, count, buffers[1]);
      const float* l = load_block(a.logvar, row, at, count, buffers[2]);
      const float* g = load_block(a.dnll, row, at, count, buffers[3]);
      const Out dx = open_block(a.dx, row, at, buffers[4]);
      const Out dm = open_block(a.dmean, row, at, buffers[5]);
      const Out dl = open_block(a.dlogvar, row, at, buffers[6]);
      BlockSum sum;
      for_vectors(count, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        const F gap = load<F>(x + i) - load<F>(m + i), dnll = load<F>(g + i);
        const F scaled = gap * exp(-load<F>(l + i));
        const F slope = dnll * scaled;
        const F dlogvar = dnll * 0.5f * fma(-gap, scaled, splat<F>(1.0f));
        sum.add(dlogvar);
        put<F>(dx, i, slope);
        put<F>(dm, i, -slope);
        put<F>(dl, i, dlogvar);
      });
      total += sum.total();
      close_block(a.dx, row, at, count, buffers[4]);
      close_block(a.dmean, row, at, count, buffers[5]);
      close_block(a.dlogvar, row, at, count, buffers[6]);
    });
    if (sums) sums[task] = total;
  });
}

static void bernoulli(const LikelihoodArgs& a, double* sums, int64_t begin, int64_t end) {
  const int64_t ahead = look_ahead(a);
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    double total = 0.0;
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer buffers[2];
      const float* x = load_block(a.x, row, at, count, buffers[0]);
      const float* s = load_block(a.mean, row, at, count, buffers[1]);
      const Ahead next_x(a.x, row + ahead, at), next_logits(a.mean, row + ahead, at);
      BlockSum sum;
      const auto body = [&](auto lane, int64_t i) __attribute__((always_inline)) {
        using F = decltype(lane);
        sum.add(bernoulli_term(load<F>(x + i), load<F>(s + i)));
      };
      for_vectors_ahead(ahead, count, body, next_x, next_logits);
      total += sum.total();
    });
    sums[task] = total;
  });
}

static void bernoulli_backward(const LikelihoodArgs& a, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer buffers[5];
      const float* x = load_block(a.x, row, at, count, buffers[0]);
      const float* s = load_block(a.mean, row, at, count, buffers[1]);
      const float* g = load_block(a.dnll, row, at, count, buffers[2]);
      const Out dx = open_block(a.dx, row, at, buffers[3]);
      const Out ds = open_block(a.dmean, row, at, buffers[4]);
      for_vectors(count, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        const F logit = load<F>(s + i), dnll = load<F>(g + i);
        put<F>(dx, i, -(dnll * logit));
        put<F>(ds, i, dnll * (sigmoid(logit) - load<F>(x + i)));
      });
      close_block(a.dx, row, at, count, buffers[3]);
      close_block(a.dmean, row, at, count, buffers[4]);
    });
  });
}

static inline int64_t level_at(const CategoricalArgs& a, int64_t row, int64_t d) {
  const int64_t at = row * a.levels_row_stride + d;
  if (a.levels_dtype == DType::i64) return ((const int64_t*)a.levels)[at];
  if (a.levels_dtype == DType::i32) return ((const int32_t*)a.levels)[at];
  return ((const uint8_t*)a.levels)[at];
}

// Runs body(F{}, vector of logits, first level, count) over the logits of one position; the last
// vector is padded with -inf, which adds nothing to a sum of exponentials.
template <class Body>
static inline void for_logits(const CategoricalArgs& a, int64_t row, int64_t d, Body body) {
  Buffer buffer;
  for_blocks(0, a.size, [&](int64_t at, int64_t n) {
    const float* s = load_block(a.logits, row, d * a.size + at, n, buffer);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(load<vf>(s + i), at + i, (int64_t)kLanes);
    if (i < n) {
      vf last = splat<vf>(-__builtin_inff());
      memcpy(&last, s + i, (n - i) * sizeof(float));
      body(last, at + i, n - i);
    }
  });
}

// The largest logit of one position and the sum of exp(s - top) over its levels.
struct Softmax {
  float top, sum;
};

static inline Softmax softmax(const CategoricalArgs& a, int64_t row, int64_t d) {
  vf highest = splat<vf>(-__builtin_inff());
  for_logits(a, row, d, [&](vf s, int64_t, int64_t) { highest = select(s > highest, s, highest); });
  const float top = max_lanes(highest);
  vf sum{};
  for_logits(a, row, d, [&](vf s, int64_t, int64_t) { sum += exp(s - top); });
  return {top, sum_lanes(sum)};
}

// Whether the logits of a group hold squares of kLanes positions and levels, which are turned
// whole.
static inline bool is_whole(const CategoricalArgs& a, int64_t count) {
  return count == kLanes && a.size >= kLanes;
}

// Runs body(first level) for squares that cover all levels; the last overlaps the one before it.
template <class Body>
static inline void for_squares(int64_t size, Body body) {
  for (int64_t k = 0; k < size; k += kLanes) body(k + kLanes <= size ? k : size - kLanes);
}

// Few levels: kLanes positions side by side, one a lane, so that nothing is horizontal. columns[k]
// holds level k of each position; lanes past count hold zeros.
struct SoftmaxGroup {
  static constexpr int64_t kMaxSize = kBlock / kLanes;
  Buffer logits, columns;
  vf top, sum;

  const float* read(const CategoricalArgs& a, int64_t row, int64_t d, int64_t count) {
    const float* s = load_block(a.logits, row, d * a.size, count * a.size, logits);
    if (count < kLanes) memset(columns.data, 0, sizeof(columns.data));
    if (is_whole(a, count)) {
      for_squares(a.size, [&](int64_t k) {
        transpose_lanes(s + k, a.size, columns.data + k * kLanes, kLanes);
      });
    } else {
      for (int64_t j = 0; j < count; ++j)
        for (int64_t k = 0; k < a.size; ++k) columns.data[k * kLanes + j] = s[j * a.size + k];
    }
    top = load<vf>(columns.data);
    for (int64_t k = 1; k < a.size; ++k) {
      const vf x = load<vf>(columns.data + k * kLanes);
      top = select(x > top, x, top);
    }
    sum = vf{};
    for (int64_t k = 0; k < a.size; ++k) {
      const vf p = exp(load<vf>(columns.data + k * kLanes) - top);
      sum += p;
      store(columns.data + k * kLanes, p);
    }
    return s;
  }
};

// Runs body(first position, count) for groups of kLanes positions.
template <class Body>
static inline void for_groups(int64_t start, int64_t n, Body body) {
  for (int64_t d = start; d < start + n; d += kLanes)
    body(d, start + n - d < kLanes ? start + n - d : (int64_t)kLanes);
}

static double few_levels(const CategoricalArgs& a, int64_t row, int64_t start, int64_t n) {
  double total = 0.0;
  SoftmaxGroup group;
  for_groups(start, n, [&](int64_t d, int64_t count) {
    const float* s = group.read(a, row, d, count);
    vf chosen = group.top;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t level = level_at(a, row, d + j);
      chosen[j] = level >= 0 && level < a.size ? s[j * a.size + level] : __builtin_nanf("");
    }
    vf nll = (group.top - chosen) + log(group.sum);
    for (int64_t j = count; j < kLanes; ++j) nll[j] = 0.0f;
    total += (double)sum_lanes(nll);
  });
  return total;
}

static double many_levels(const CategoricalArgs& a, int64_t row, int64_t start, int64_t n) {
  double total = 0.0;
  for (int64_t d = start; d < start + n; ++d) {
    const int64_t level = level_at(a, row, d);
    if (level < 0 || level >= a.size) return __builtin_nan("");
    Buffer one;
    const Softmax p = softmax(a, row, d);
    const float chosen = *load_block(a.logits, row, d * a.size + level, 1, one);
    total += (double)((p.top - chosen) + log(p.sum));
  }
  return total;
}

static void categorical(const CategoricalArgs& a, double* sums, int64_t begin, int64_t end) {
  const bool few = a.size <= SoftmaxGroup::kMaxSize;
  for_chunks(a.columns, begin, end, [&](int64_t task, int64_t row, int64_t start, int64_t n) {
    sums[task] = few ? few_levels(a, row, start, n) : many_levels(a, row, start, n);
  });
}

static void few_levels_backward(const CategoricalArgs& a, float dnll, int64_t row, int64_t start,
                                int64_t n) {
  SoftmaxGroup group;
  Buffer buffer;
  for_groups(start, n, [&](int64_t d, int64_t count) {
    group.read(a, row, d, count);
    vf scale = dnll / group.sum;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t level = level_at(a, row, d + j);
      if (level < 0 || level >= a.size) scale[j] = __builtin_nanf("");
    }
    for (int64_t k = 0; k < a.size; ++k) {
      float* column = group.columns.data + k * kLanes;
      store(column, load<vf>(column) * scale);
    }
    float* out = open_block(a.dlogits, row, d * a.size, buffer).data;
    if (is_whole(a, count)) {
      for_squares(a.size, [&](int64_t k) {
        transpose_lanes(group.columns.data + k * kLanes, kLanes, out + k, a.size);
      });
    } else {
      for (int64_t j = 0; j < count; ++j)
        for (int64_t k = 0; k < a.size; ++k)
          out[j * a.size + k] = group.columns.data[k * kLanes + j];
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t level = level_at(a, row, d + j);
      if (level >= 0 && level < a.size) out[j * a.size + level] -= dnll;
    }
    close_block(a.dlogits, row, d * a.size, count * a.size, buffer);
  });
}

static void many_levels_backward(const CategoricalArgs& a, float dnll, int64_t row, int64_t start,
                                 int64_t n) {
  Buffer buffer;
  for (int64_t d = start; d < start + n; ++d) {
    const int64_t level = level_at(a, row, d);
    const float g = level >= 0 && level < a.size ? dnll : __builtin_nanf("");
    const Softmax p = softmax(a, row, d);
    const float scale = 1.0f / p.sum;
    for_logits(a, row, d, [&](vf s, int64_t first, int64_t count) {
      vf gradient = exp(s - p.top) * scale;
      if (level >= first && level < first + count) gradient[level - first] -= 1.0f;
      gradient *= g;
      float* out = open_block(a.dlogits, row, d * a.size + first, buffer).data;
      memcpy(out, &gradient, count * sizeof(float));
      close_block(a.dlogits, row, d * a.size + first, count, buffer);
    });
  }
}

static void categorical_backward(const CategoricalArgs& a, int64_t begin, int64_t end) {
  const bool few = a.size <= SoftmaxGroup::kMaxSize;
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    Buffer one;
    const float dnll = *load_block(a.dnll, row, 0, 1, one);
    few ? few_levels_backward(a, dnll, row, start, n)
        : many_levels_backward(a, dnll, row, start, n);
  });
}

extern const LikelihoodTable likelihood_table = {
    gaussian, gaussian_backward, bernoulli, bernoulli_backward, categorical, categorical_backward};

}  // namespace GM_ISA
}  // namespace gm
