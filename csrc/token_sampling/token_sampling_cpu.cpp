#include "common/block.h"
#include "token_sampling/token_sampling.h"

namespace gm {
namespace GM_ISA {

static_assert(kGroup % (4 * kLanes) == 0, "a group must be whole vectors of noise");

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.4028234663852886e38f;  // what is finite is at least this

// A row in groups of 64, the last one filled up with -inf.
struct Row {
  const float* x;
  const float* last;
  int64_t groups;
  const float* operator[](int64_t g) const { return g + 1 < groups ? x + g * kGroup : last; }
};

static Row open_row(const SamplingArgs& a, const SamplingScratch& s, int64_t row) {
  const int64_t groups = groups_of(a.columns), whole = (groups - 1) * kGroup;
  const int64_t at = row * a.logits.row_stride;
  if (a.logits.dtype == DType::f32) {
    const float* x = (const float*)a.logits.data + at;
    for (int64_t i = 0; i < kGroup; ++i) s.x[i] = whole + i < a.columns ? x[whole + i] : -kInfinity;
    return {x, s.x, groups};
  }
  const uint16_t* in = (const uint16_t*)a.logits.data + at;
  const bool is_bf16 = a.logits.dtype == DType::bf16;
  int64_t i = 0;
  for (; i + kLanes <= a.columns; i += kLanes) {
    vu16 h;
    memcpy(&h, in + i, sizeof(h));
    store<vf>(s.x + i, is_bf16 ? from_bf16(h) : from_f16(h));
  }
  for (; i < a.columns; ++i) s.x[i] = is_bf16 ? from_bf16(in[i]) : from_f16(in[i]);
  for (; i < groups * kGroup; ++i) s.x[i] = -kInfinity;
  return {s.x, s.x + whole, groups};
}

// The maximum of each group and of the row; NaN if the row holds one.
static float find_tops(const Row& row, float* top) {
  vf most = splat<vf>(-kInfinity);
  vi nan{};
  for (int64_t g = 0; g < row.groups; ++g) {
    const float* x = row[g];
    vf m = load<vf>(x);
    nan |= m != m;
    for (int64_t i = kLanes; i < kGroup; i += kLanes) {
      const vf v = load<vf>(x + i);
      nan |= v != v;
      m = select(v > m, v, m);
    }
    top[g] = max_lanes(m);
    most = select(m > most, m, most);
  }
  for (int i = 0; i < kLanes; ++i) {
    if (nan[i]) return __builtin_nanf("");
  }
  return max_lanes(most);
}

static int64_t first_equal(const Row& row, const float* top, float value) {
  for (int64_t g = 0; g < row.groups; ++g) {
    for (int64_t i = 0; top[g] == value && i < kGroup; ++i) {
      if (row[g][i] == value) return g * kGroup + i;
    }
  }
  return kNoToken;
}

template <class T>
static void swap(T& a, T& b) {
  const T c = a;
  a = b;
  b = c;
}

static float key_of(float x) { return x; }
static float key_of(const Candidate& c) { return c.x; }

static float middle(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}

struct Cut {
  int64_t above, equal;
};

// Reorders a[0, n): first what is above the pivot, then what equals it, then the rest.
template <class T>
static Cut partition(T* a, int64_t n, float pivot) {
  int64_t above = 0, i = 0, below = n;
  while (i < below) {
    const float x = key_of(a[i]);
    if (x > pivot) {
      swap(a[above++], a[i++]);
    } else if (x < pivot) {
      swap(a[i], a[--below]);
    } else {
      ++i;
    }
  }
  return {above, below - above};
}

template <class T>
static float pivot_of(const T* a, int64_t n) {
  return middle(key_of(a[0]), key_of(a[n / 2]), key_of(a[n - 1]));
}

// The k-th largest of a[0, n), 1 <= k <= n; reorders a.
static float kth_largest(float* a, int64_t n, int64_t k) {
  for (;;) {
    const float pivot = pivot_of(a, n);
    const Cut cut = partition(a, n, pivot);
    if (k <= cut.above) {
      n = cut.above;
    } else if (k <= cut.above + cut.equal) {
      return pivot;
    } else {
      const int64_t skip = cut.above + cut.equal;
      a += skip, n -= skip, k -= skip;
    }
  }
}

// The least kept logit under top-k. The k-th largest of the groups' maxima is a lower bound, which
// few tokens pass.
static float top_k_threshold(const Row& row, const SamplingScratch& s, int64_t k) {
  float bound = kLowest;
  if (k <= row.groups) {
    memcpy(s.sorted, s.top, row.groups * sizeof(float));
    const float kth = kth_largest(s.sorted, row.groups, k);
    if (kth > bound) bound = kth;
  }
  int64_t n = 0;
  for (int64_t g = 0; g < row.groups; ++g) {
    if (s.top[g] < bound) continue;
    const float* x = row[g];
    for (int64_t i = 0; i < kGroup; ++i) {
      s.sorted[n] = x[i];
      n += x[i] >= bound;
    }
  }
  return n > k ? kth_largest(s.sorted, n, k) : bound;
}

// Log-weights d of a group, at least the lowest, and their bins, which never decrease as d falls.
static void log_weights(const float* x, float top, float sharpness, float* d, int32_t* bins) {
  for (int64_t i = 0; i < kGroup; i += kLanes) {
    const vf v = max_keeping_nan((load<vf>(x + i) - top) * sharpness, kLowestLogWeight);
    store<vf>(d + i, v);
    const vi bin = to_int(v * ((kBins - 1) / kLowestLogWeight));
    memcpy(bins + i, &bin, sizeof(bin));
  }
}

// The least kept logit among candidates in any order: x is kept if above, and what in a[0, n) is
// greater than x, together stay below the bound.
static float nucleus_threshold(Candidate* a, int64_t n, double above, double bound) {
  float least = a[0].x;
  while (n > 0) {
    const float pivot = pivot_of(a, n);
    const Cut cut = partition(a, n, pivot);
    double greater = 0.0, equal = 0.0;
    for (int64_t i = 0; i < cut.above; ++i) greater += a[i].w;
    for (int64_t i = 0; i < cut.equal; ++i) equal += a[cut.above + i].w;
    if (above + greater >= bound) {
      n = cut.above;
      continue;
    }
    least = pivot;
    above += greater + equal;
    if (above >= bound) break;
    a += cut.above + cut.equal, n -= cut.above + cut.equal;
  }
  return least;
}

// The least kept logit under top-p, of those at least `least`. A histogram finds the bin where the
// nucleus ends; only the tokens of this bin are looked at one by one.
static float top_p_threshold(const SamplingArgs& a, const Row& row, const SamplingScratch& s,
                             float top, float least) {
  alignas(64) float d[kGroup], e[kGroup];
  alignas(64) int32_t bins[kGroup];
  memset(s.mass, 0, kBins * sizeof(double));
  for (int64_t g = 0; g < row.groups; ++g) {
    if (s.top[g] < least) continue;
    const float* x = row[g];
    log_weights(x, top, a.sharpness, d, bins);
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const vf kept = select(load<vf>(x + i) >= least, exp_fixed(load<vf>(d + i)), vf{});
      store<vf>(e + i, kept);
    }
    for (int64_t i = 0; i < kGroup; ++i) s.mass[bins[i]] += fixed_point(e[i]);
  }
  double total = 0.0;
  for (int64_t i = 0; i < kBins; ++i) total += s.mass[i];
  const double bound = total * a.share * 0x1p-30;
  double above = 0.0;
  int32_t last = 0;
  while (above + s.mass[last] < bound) above += s.mass[last++];
  int64_t n = 0;
  for (int64_t g = 0; g < row.groups; ++g) {
    if (s.top[g] < least) continue;
    const float* x = row[g];
    log_weights(x, top, a.sharpness, d, bins);
    for (int64_t i = 0; i < kGroup; ++i) {
      if (bins[i] == last && x[i] >= least)
        s.candidates[n++] = {x[i], fixed_point(exp_fixed(d[i]))};
    }
  }
  return nucleus_threshold(s.candidates, n, above, bound);
}

// The kept token with the largest 2 d + h, the first of equals.
static int64_t draw(const SamplingArgs& a, const Row& row, const float* tops, const NoiseKey& key,
                    uint64_t noise_row, float top, float least) {
  vf best = splat<vf>(-kInfinity);
  vi token{}, lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  alignas(64) float h[4 * kLanes];
  for (int64_t g = 0; g < row.groups; ++g) {
    if (tops[g] < least) continue;
    for (int64_t start = 0; start < kGroup; start += 4 * kLanes) {
      const float* x = row[g] + start;
      const int32_t at = (int32_t)(g * kGroup + start);
      vu words[4];
      philox_words(key, noise_row, (uint32_t)at / 4, words);
      store_transposed4(h, gumbel<vf>(words[0]), gumbel<vf>(words[1]), gumbel<vf>(words[2]),
                        gumbel<vf>(words[3]));
      for (int j = 0; j < 4; ++j) {
        const vf v = load<vf>(x + j * kLanes), d = (v - top) * a.sharpness;
        const vf score = (d + d) + load<vf>(h + j * kLanes);
        const vi better = (v >= least) & (score > best);
        best = select(better, score, best);
        token = better ? lane + (at + j * kLanes) : token;
      }
    }
  }
  float most = best[0];
  int64_t first = token[0];
  for (int i = 1; i < kLanes; ++i) {
    if (best[i] > most || (best[i] == most && token[i] < first)) most = best[i], first = token[i];
  }
  return first;
}

static void next_token(const SamplingArgs& a, const SamplingScratch& s, int64_t begin,
                       int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Row row = open_row(a, s, b);
    const float top = find_tops(row, s.top);
    if (!(top >= kLowest && top < kInfinity)) {
      a.tokens[b] = kNoToken;
    } else if (a.greedy) {
      a.tokens[b] = first_equal(row, s.top, top);
    } else {
      float least = kLowest;
      if (a.top_k > 0 && a.top_k < a.columns) least = top_k_threshold(row, s, a.top_k);
      if (a.share > 0) least = top_p_threshold(a, row, s, top, least);
      const NoiseKey key = fold_key(a.key, a.position[b]);
      a.tokens[b] = draw(a, row, s.top, key, key.offset + (uint64_t)b, top, least);
    }
  }
}

extern const TokenSamplingTable token_sampling_table = {next_token};

}  // namespace GM_ISA
}  // namespace gm
