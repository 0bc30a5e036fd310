// The forward of one tile of queries: keys stream past in blocks, lanes run over the queries.
//     S^T = K Q^T,  P^T = exp(S^T - max),  O^T = V^T P^T
#pragma once

#include "attention/softmax.h"

namespace gm {
namespace GM_ISA {

constexpr int kKeys = 96;  // of a block
static_assert(kKeys % kRows == 0 && kKeys % 2 == 0, "rows and pairs must tile the keys");

template <class S>
class Forward {
  using Word = typename S::Word;

 public:
  explicit Forward(const AttentionArgs& a)
      : a_(a),
        score_(a),
        wide_(padded(a.width)),
        rows_(scratch<Word>(std::max<int64_t>(kTile, kKeys) * wide_)),
        turned_(scratch<Word>(words<S>(a.width) * kTile)),
        scores_(scratch<float>(kKeys * kTile)),
        paired_(scratch<Word>(S::kPer == 1 ? 1 : kKeys / S::kPer * kTile)),
        out_(scratch<float>(wide_ * kTile)) {}

  void run(const Tile& t) {
    const int64_t kv_head = t.h / a_.group();
    const auto q = read_rows(S{}, a_.q, t.b, t.h, t.i, t.n, a_.width, rows_.get());
    turn(q.data, q.row, words<S>(a_.width), t.n, turned_.get());
    score_.pack(turned_.get(), words<S>(a_.width) * kTile);
    Running run;
    memset(out_.get(), 0, a_.width * kTile * sizeof(float));
    for (int64_t j = t.first; j < t.last; j += kKeys)
      block(t, kv_head, j, std::min<int64_t>(kKeys, t.last - j), run);
    finish(t, run);
  }

 private:
  void block(const Tile& t, int64_t kv_head, int64_t j, int64_t keys, Running& run) {
    float* s = scores_.get();
    const auto k = read_rows(S{}, a_.k, t.b, kv_head, j, keys, a_.width, rows_.get());
    const bool all = t.sees_all(a_, j, keys);
    product_by_key<S>(t, all, j, keys,
                      {k.data, k.row, 1, turned_.get(), kTile, s, kTile, words<S>(a_.width)});
    score_.cap(s, keys, t.vectors);
    if (!all) hide(a_, t, j, keys, s);
    const auto softmax = score_.is_unit()
                             ? (all ? softmax_block<false, true> : softmax_block<true, true>)
                             : (all ? softmax_block<false, false> : softmax_block<true, false>);
    const bool shrinks = softmax(score_.factor, s, keys, t.vectors, run);
    if (!a_.has_values) return;
    if (shrinks && j > t.first) {
      for (int64_t d = 0; d < a_.width; ++d)
        for (int64_t v = 0; v < t.vectors; ++v) {
          float* at = out_.get() + d * kTile + v * kLanes;
          store<vf>(at, load<vf>(at) * load<vf>(run.shrink + v * kLanes));
        }
    }
    const auto v = read_columns(S{}, a_.v, t.b, kv_head, j, keys, a_.width, a_.width, rows_.get());
    const Word* p = along_keys(S{}, s, keys, t.vectors, paired_.get());
    product_over_keys<S>(t, all, j, keys,
                         {v.data, 1, v.row, p, kTile, out_.get(), kTile, words<S>(keys)}, a_.width);
  }

  void finish(const Tile& t, Running& run) {
    alignas(64) float inverse[kTile];
    const int64_t at = (t.b * a_.heads + t.h) * a_.queries + t.i;
    for (int64_t v = 0; v < t.vectors; ++v) {
      const vf sum = load<vf>(run.sum + v * kLanes);
      const auto none = sum == 0.0f;
      store<vf>(inverse + v * kLanes, select(none, vf{}, 1.0f / sum));
      const vf lse = fma(load<vf>(run.top + v * kLanes), splat<vf>(kLn2), log(sum));
      store<vf>(run.shrink + v * kLanes, select(none, splat<vf>(-__builtin_inff()), lse));
    }
    memcpy(a_.lse_out + at, run.shrink, t.n * sizeof(float));
    if (!a_.has_values) return;
    const int64_t bytes = a_.q.dtype == DType::f32 ? 4 : 2;
    write_turned(out_.get(), inverse, t.n, a_.width, (char*)a_.o_out + at * a_.width * bytes,
                 a_.width, a_.q.dtype);
  }

  const AttentionArgs& a_;
  Scores<S> score_;
  int64_t wide_;
  Scratch<Word> rows_, turned_;
  Scratch<float> scores_;
  Scratch<Word> paired_;
  Scratch<float> out_;
};

// Tiles of a (batch, head) in turn from both ends: neighbouring tasks cost alike under a causal
// mask.
static inline int64_t from_both_ends(int64_t i, int64_t n) { return i % 2 ? n - 1 - i / 2 : i / 2; }

template <class S>
static void forward_tasks(const AttentionArgs& a, int64_t begin, int64_t end) {
  Forward<S> forward(a);
  const int64_t tiles = a.tiles();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / tiles;
    forward.run(Tile(a, pair / a.heads, pair % a.heads, from_both_ends(task % tiles, tiles)));
  }
}

}  // namespace GM_ISA
}  // namespace gm
