// A tile of own rows, which lanes run over, while blocks of other rows j stream past it.
//     S^T = scale K Q^T;  lse = log sum_j exp(S);
//     W^T = dlse exp(S^T - lse) + other_dlse exp(S^T - other_lse),  dQ^T += scale K^T W^T
#pragma once

#include "common/online.h"
#include "common/pack.h"
#include "contrastive/contrastive.h"

namespace gm {
namespace GM_ISA {

constexpr int kOthers = 96;  // of a block
static_assert(kOthers % kRows == 0 && kOthers % 2 == 0, "rows and pairs must tile the others");

// A block of scores with lanes over own rows, and what in it is no negative.
template <class S>
class PairScores {
  using Word = typename S::Word;

 public:
  explicit PairScores(const ContrastArgs& a)
      : a_(a),
        rows_(scratch<Word>(std::max<int64_t>(kTile, kOthers) * padded(a.width))),
        turned_(scratch<Word>(words<S>(a.width) * kTile)),
        scores_(scratch<float>(kOthers * kTile)) {}

  // Single rows take the factor scale log2(e) beforehand; bfloat16 rows stay as they are.
  static constexpr bool kUnit = S::kPer == 1;
  float factor() const { return kUnit ? 1.0f : a_.scale * kLog2E; }

  void take_tile(int64_t tile) {
    i = tile * kTile;
    n = std::min<int64_t>(kTile, a_.rows - i);
    vectors = (n + kLanes - 1) / kLanes;
    const int64_t words_of_row = words<S>(a_.width);
    const auto q = read_rows(S{}, a_.own, 0, 0, i, n, a_.width, rows_.get());
    turn(q.data, q.row, words_of_row, n, turned_.get());
    if constexpr (kUnit) {
      const float factor = a_.scale * kLog2E;
      for (int64_t at = 0; at < words_of_row * kTile; at += kLanes)
        store<vf>(turned_.get() + at, load<vf>(turned_.get() + at) * factor);
    }
  }

  // Scores of the others [j, j + count), in powers of two once multiplied by factor().
  float* block(int64_t j, int64_t count) {
    const auto k = read_rows(S{}, a_.other, 0, 0, j, count, a_.width, rows_.get());
    product<S, false>(
        {k.data, k.row, 1, turned_.get(), kTile, scores_.get(), kTile, words<S>(a_.width)}, count,
        vectors);
    return scores_.get();
  }

  // Writes `value` where the pair is left out; returns whether there was any.
  bool leave_out(int64_t j, int64_t count, float value) {
    const int64_t pairs = a_.pairs, apart = ((i - j) % pairs + pairs) % pairs;
    if (apart >= count && apart + n <= pairs) return false;
    for (int64_t q = 0; q < n; ++q)
      for (int64_t row = (apart + q) % pairs; row < count; row += pairs)
        scores_[row * kTile + q] = value;
    return true;
  }

  // The others [j, j + count) as words along j, for the A side of a product that sums over them.
  Rows<S> columns(int64_t j, int64_t count) {
    return read_columns(S{}, a_.other, 0, 0, j, count, a_.width, a_.width, rows_.get());
  }

  int64_t i, n, vectors;  // own rows [i, i + n) of the tile, and the vectors that hold them

 private:
  const ContrastArgs& a_;
  Scratch<Word> rows_, turned_;
  Scratch<float> scores_;
};

template <class S>
static void forward_tiles(const ContrastArgs& a, int64_t begin, int64_t end) {
  using P = PairScores<S>;
  P scores(a);
  for (int64_t tile = begin; tile < end; ++tile) {
    scores.take_tile(tile);
    Running run;
    for (int64_t j = 0; j < a.rows; j += kOthers) {
      const int64_t count = std::min<int64_t>(kOthers, a.rows - j);
      float* s = scores.block(j, count);
      scores.leave_out(j, count, kHidden)
          ? softmax_block<true, P::kUnit>(scores.factor(), s, count, scores.vectors, run)
          : softmax_block<false, P::kUnit>(scores.factor(), s, count, scores.vectors, run);
    }
    for (int64_t v = 0; v < scores.vectors; ++v) {
      const vf sum = load<vf>(run.sum + v * kLanes);
      const vf lse = fma(load<vf>(run.top + v * kLanes), splat<vf>(kLn2), log(sum));
      store<vf>(run.shrink + v * kLanes, select(sum == 0.0f, splat<vf>(-__builtin_inff()), lse));
    }
    memcpy(a.lse_out + scores.i, run.shrink, scores.n * sizeof(float));
  }
}

// Log-sum-exps in powers of two and their gradients, rows [i, i + n) of `to`.
struct Statistics {
  alignas(64) float lse[kOthers > kTile ? kOthers : kTile];
  alignas(64) float dlse[kOthers > kTile ? kOthers : kTile];
  void read(const float* all_lse, const float* all_dlse, int64_t i, int64_t n, int64_t to) {
    for (int64_t r = 0; r < to; ++r) {
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
static void gradient_tiles(const ContrastArgs& a, int64_t begin, int64_t end) {
  using P = PairScores<S>;
  P scores(a);
  const Scratch<float> out = scratch<float>(padded(a.width) * kTile);
  const auto w_words = scratch<typename S::Word>(S::kPer == 1 ? 1 : kOthers / S::kPer * kTile);
  const auto weigh_block = a.dlse ? (a.other_dlse ? weigh<true, true> : weigh<true, false>)
                                  : (a.other_dlse ? weigh<false, true> : weigh<false, false>);
  Statistics own, other;
  alignas(64) float scale[kTile];
  std::fill_n(scale, kTile, a.scale);
  for (int64_t tile = begin; tile < end; ++tile) {
    scores.take_tile(tile);
    if (a.dlse) own.read(a.lse, a.dlse, scores.i, scores.n, kTile);
    memset(out.get(), 0, a.width * kTile * sizeof(float));
    for (int64_t j = 0; j < a.rows; j += kOthers) {
      const int64_t count = std::min<int64_t>(kOthers, a.rows - j);
      float* s = scores.block(j, count);
      if (a.other_dlse) other.read(a.other_lse, a.other_dlse, j, count, count);
      weigh_block(s, scores.factor(), P::kUnit, count, scores.vectors, own, other);
      scores.leave_out(j, count, 0.0f);
      const auto k = scores.columns(j, count);
      const auto* w = along_keys(S{}, s, count, scores.vectors, w_words.get());
      product<S, true>({k.data, 1, k.row, w, kTile, out.get(), kTile, words<S>(count)}, a.width,
                       scores.vectors);
    }
    const int64_t bytes = a.own.dtype == DType::f32 ? 4 : 2;
    write_turned(out.get(), scale, scores.n, a.width,
                 (char*)a.gradient + scores.i * a.width * bytes, a.width, a.own.dtype);
  }
}

}  // namespace GM_ISA
}  // namespace gm
