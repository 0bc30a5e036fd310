// A tile of own rows, which lanes run over, and a tile of other rows, visited for both.
//     S^T = scale K Q^T;  lse = log sum_j exp(S), other_lse = log sum_i exp(S);
//     W^T = dlse exp(S^T - lse) + other_dlse exp(S^T - other_lse),
//     dQ += scale W K,  dK += scale W^T Q
#pragma once

#include <initializer_list>

#include "common/online.h"
#include "common/pack.h"
#include "contrastive/contrastive.h"

namespace gm {
namespace GM_ISA {

static_assert(sizeof(Running) == kOwnRunning * kTile * sizeof(float) && 2 * kLanes <= kOtherRunning,
              "the states of a tile must fit");

static inline Running& own_running(const ContrastArgs& a, int64_t tile) {
  return *(Running*)(a.own_running + tile * kTile * kOwnRunning);
}

// Single rows take the factor scale log2(e) beforehand; bfloat16 rows stay as they are.
template <class S>
constexpr bool kUnit = S::kPer == 1;
template <class S>
static inline float score_factor(const ContrastArgs& a) {
  return kUnit<S> ? 1.0f : a.scale * kLog2E;
}

template <class S>
static typename S::Word* turned_tile(const ContrastArgs& a, int64_t tile) {
  return (typename S::Word*)a.turned + tile * padded(a.width) * kTile;
}

template <class S>
static void prepare_tiles(const ContrastArgs& a, int64_t begin, int64_t end) {
  using Word = typename S::Word;
  const int64_t wide = padded(a.width), row_words = words<S>(a.width);
  const Scratch<Word> rows = scratch<Word>(kTile * wide);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t n = a.tile_rows(tile);
    const auto q = read_rows(S{}, a.own, 0, 0, tile * kTile, n, a.width, rows.get());
    Word* turned = turned_tile<S>(a, tile);
    turn(q.data, q.row, row_words, n, turned);
    if constexpr (kUnit<S>) {
      const float factor = a.scale * kLog2E;
      for (int64_t at = 0; at < row_words * kTile; at += kLanes)
        store<vf>(turned + at, load<vf>(turned + at) * factor);
    }
    if (a.own_running) new (&own_running(a, tile)) Running();
    for (int64_t row = tile * kTile; row < tile * kTile + n; ++row) {
      if (a.other_running) {
        store<vf>(a.other_running + row * kOtherRunning, splat<vf>(kHidden));
        store<vf>(a.other_running + row * kOtherRunning + kLanes, vf{});
      }
      for (float* sums : {a.own_sums, a.other_sums})
        if (sums) memset(sums + row * wide, 0, wide * sizeof(float));
    }
  }
}

// Scores of a pair of tiles, [others, kTile], and what in it is no negative.
template <class S>
class PairOfTiles {
  using Word = typename S::Word;

 public:
  explicit PairOfTiles(const ContrastArgs& a)
      : a_(a),
        rows_(scratch<Word>(kTile * padded(a.width))),
        scores_(scratch<float>(kTile * kTile)) {}

  // Scores in powers of two once multiplied by score_factor().
  float* visit(int64_t own_tile, int64_t other_tile) {
    i = own_tile * kTile, n = a_.tile_rows(own_tile);
    j = other_tile * kTile, count = a_.tile_rows(other_tile);
    vectors = (n + kLanes - 1) / kLanes;
    const auto k = read_rows(S{}, a_.other, 0, 0, j, count, a_.width, rows_.get());
    product<S, false>({k.data, k.row, 1, turned_tile<S>(a_, own_tile), kTile, scores_.get(), kTile,
                       words<S>(a_.width)},
                      count, vectors);
    return scores_.get();
  }

  // Writes `value` where a pair is left out or an own row is none; returns whether it had to.
  bool leave_out(float value) {
    float* s = scores_.get();
    const int64_t lanes = vectors * kLanes;
    for (int64_t row = 0; row < count && n < lanes; ++row)
      std::fill(s + row * kTile + n, s + row * kTile + lanes, value);
    const int64_t pairs = a_.pairs, apart = ((i - j) % pairs + pairs) % pairs;
    if (apart >= count && apart + n <= pairs) return n < lanes;
    for (int64_t q = 0; q < n; ++q)
      for (int64_t row = (apart + q) % pairs; row < count; row += pairs) s[row * kTile + q] = value;
    return true;
  }

  // Rows of one side as words along them, for the B side of a product that sums over them.
  Rows<S> columns(const Heads& x, int64_t first, int64_t size) {
    return read_columns(S{}, x, 0, 0, first, size, a_.width, padded(a_.width), rows_.get());
  }

  int64_t i, n, j, count;  // own rows [i, i + n), others [j, j + count)
  int64_t vectors;         // that hold the own rows

 private:
  const ContrastArgs& a_;
  Scratch<Word> rows_;
  Scratch<float> scores_;
};

// Takes a block of scores into the maxima and sums of the other rows, each lane for itself.
template <bool kMasked, bool kOne>
static inline void running_rows(float score_factor, const float* s, int64_t count, int64_t vectors,
                                float* running) {
  const vf factor = splat<vf>(score_factor);
  for (int64_t row = 0; row < count; ++row, s += kTile, running += kOtherRunning) {
    vf top = load<vf>(s);
    for (int64_t v = 1; v < vectors; ++v) top = larger(load<vf>(s + v * kLanes), top);
    const vf before = load<vf>(running);
    top = larger(top * factor, before);
    vf sum = load<vf>(running + kLanes) * exp2_nonpositive(before - top);
    for (int64_t v = 0; v < vectors; ++v) {
      const vf x = load<vf>(s + v * kLanes);
      const vf p = exp2_nonpositive(minus<kOne>(x, factor, top));
      sum += kMasked ? select(x == kHidden, vf{}, p) : p;
    }
    store<vf>(running, top);
    store<vf>(running + kLanes, sum);
  }
}

template <class S>
static void forward_round(const ContrastArgs& a, int64_t round, int64_t begin, int64_t end) {
  constexpr bool kOne = kUnit<S>;
  const float factor = score_factor<S>(a);
  PairOfTiles<S> pair(a);
  for (int64_t tile = begin; tile < end; ++tile) {
    float* s = pair.visit(tile, (tile + round) % a.tiles());
    const bool masked = pair.leave_out(kHidden);
    if (a.other_running && !(a.symmetric && round == 0))
      (masked ? running_rows<true, kOne>
              : running_rows<false, kOne>)(factor, s, pair.count, pair.vectors,
                                           a.other_running + pair.j * kOtherRunning);
    (masked ? softmax_block<true, kOne> : softmax_block<false, kOne>)(factor, s, pair.count,
                                                                      pair.vectors,
                                                                      own_running(a, tile));
  }
}

// Maxima and sums of the tile of other rows that begins at j, the lanes of each taken together.
static inline void join_lanes(const ContrastArgs& a, int64_t j, int64_t count, Running& run) {
  for (int64_t row = 0; row < count; ++row) {
    const float* running = a.other_running + (j + row) * kOtherRunning;
    const vf tops = load<vf>(running);
    run.top[row] = max_lanes(tops);
    run.sum[row] =
        sum_lanes(load<vf>(running + kLanes) * exp2_nonpositive(tops - splat<vf>(run.top[row])));
  }
}

static inline void join(const Running& more, Running& run) {
  for (int v = 0; v < kTile; v += kLanes) {
    const vf a = load<vf>(run.top + v), b = load<vf>(more.top + v), top = larger(a, b);
    store<vf>(run.top + v, top);
    store<vf>(run.sum + v, fma(load<vf>(run.sum + v), exp2_nonpositive(a - top),
                               load<vf>(more.sum + v) * exp2_nonpositive(b - top)));
  }
}

static inline void write_lse(const Running& run, int64_t n, float* out) {
  alignas(64) float lses[kTile];
  for (int v = 0; v < kTile; v += kLanes) {
    const vf sum = load<vf>(run.sum + v);
    const vf lse = fma(load<vf>(run.top + v), splat<vf>(kLn2), log(sum));
    store<vf>(lses + v, select(sum == 0.0f, splat<vf>(-__builtin_inff()), lse));
  }
  memcpy(out, lses, n * sizeof(float));
}

static inline void finish_forward(const ContrastArgs& a, int64_t tile) {
  const int64_t i = tile * kTile, n = a.tile_rows(tile);
  Running& own = own_running(a, tile);
  if (a.other_running) {
    Running other;
    join_lanes(a, i, n, other);
    if (a.symmetric) join(other, own);
    if (a.other_lse_out) write_lse(other, n, a.other_lse_out + i);
  }
  write_lse(own, n, a.lse_out + i);
}

// Log-sum-exps in powers of two and their gradients, rows [i, i + n); zeros beyond.
struct Statistics {
  alignas(64) float lse[kTile] = {};
  alignas(64) float dlse[kTile] = {};
  void read(const float* all_lse, const float* all_dlse, int64_t i, int64_t n) {
    for (int64_t r = 0; r < kTile; ++r) {
      lse[r] = r < n ? all_lse[i + r] * kLog2E : 0.0f;
      dlse[r] = r < n ? all_dlse[i + r] : 0.0f;
    }
  }
};

// Scores to W.
template <bool kOwn, bool kOther>
static inline void weigh(float* s, float score_factor, bool is_unit, int64_t count, int64_t vectors,
                         const Statistics& own, const Statistics& other) {
  const vf factor = splat<vf>(score_factor);
  for (int64_t v = 0; v < vectors; ++v) {
    const vf lse = load<vf>(own.lse + v * kLanes), dlse = load<vf>(own.dlse + v * kLanes);
    for (int64_t row = 0; row < count; ++row) {
      float* at = s + row * kTile + v * kLanes;
      const vf x = is_unit ? load<vf>(at) : load<vf>(at) * factor;
      vf w{};
      if constexpr (kOwn) w = dlse * exp2_nonpositive(x - lse);
      if constexpr (kOther)
        w = fma(splat<vf>(other.dlse[row]), exp2_nonpositive(x - other.lse[row]), w);
      store<vf>(at, w);
    }
  }
}

template <class S>
static void gradient_round(const ContrastArgs& a, int64_t round, int64_t begin, int64_t end) {
  using Word = typename S::Word;
  const int64_t wide = padded(a.width), lanes = wide / kLanes;
  const Scratch<Word> w_words = scratch<Word>(S::kPer == 1 ? 1 : kTile * kTile / S::kPer);
  const auto weigh_block = a.dlse ? (a.other_dlse ? weigh<true, true> : weigh<true, false>)
                                  : (a.other_dlse ? weigh<false, true> : weigh<false, false>);
  PairOfTiles<S> pair(a);
  Statistics own, other;
  for (int64_t tile = begin; tile < end; ++tile) {
    float* s = pair.visit(tile, (tile + round) % a.tiles());
    const int64_t i = pair.i, n = pair.n, j = pair.j, count = pair.count;
    if (a.dlse) own.read(a.lse, a.dlse, i, n);
    if (a.other_dlse) other.read(a.other_lse, a.other_dlse, j, count);
    weigh_block(s, score_factor<S>(a), kUnit<S>, count, pair.vectors, own, other);
    pair.leave_out(0.0f);
    if (a.own_sums) {
      const Word* w = along_keys(S{}, s, count, pair.vectors, w_words.get());
      const auto k = pair.columns(a.other, j, count);
      product<S, true>({w, 1, kTile, k.data, k.row, a.own_sums + i * wide, wide, words<S>(count)},
                       n, lanes);
    }
    if (a.other_sums && !(a.symmetric && round == 0)) {
      const Word* w = along_queries(S{}, s, count, pair.vectors, w_words.get());
      const auto q = pair.columns(a.own, i, n);
      product<S, true>(
          {w, kTile / S::kPer, 1, q.data, q.row, a.other_sums + j * wide, wide, words<S>(n)}, count,
          lanes);
    }
  }
}

// Row `row` of a gradient: scale times its sums, those of both sides if they are the same rows.
static inline void write_gradient(const ContrastArgs& a, const float* sums, const float* more,
                                  int64_t row, void* gradient) {
  const int64_t wide = padded(a.width), bytes = a.own.dtype == DType::f32 ? 4 : 2;
  char* out = (char*)gradient + row * a.width * bytes;
  for_vectors(a.width, [&](auto lane, int64_t d) {
    using F = decltype(lane);
    F sum = load<F>(sums + row * wide + d);
    if (more) sum += load<F>(more + row * wide + d);
    store_as(out, a.own.dtype, d, sum * a.scale);
  });
}

static inline void finish_tiles(const ContrastArgs& a, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    if (a.lse_out) finish_forward(a, tile);
    for (int64_t row = tile * kTile; row < tile * kTile + a.tile_rows(tile); ++row) {
      if (a.gradient)
        write_gradient(a, a.own_sums, a.symmetric ? a.other_sums : nullptr, row, a.gradient);
      if (a.other_gradient) write_gradient(a, a.other_sums, nullptr, row, a.other_gradient);
    }
  }
}

}  // namespace GM_ISA
}  // namespace gm
