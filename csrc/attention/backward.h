// The backward of one part of a (batch, key head): tiles of queries outside, blocks of keys inside.
//     P^T = exp(S^T - lse),  dP^T = V dO^T,  dS^T = P^T (dP^T - delta)
//     dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T
#pragma once

#include "attention/forward.h"

namespace gm {
namespace GM_ISA {

constexpr int kBackwardKeys = 48;  // of a block: two blocks of scores live at once
static_assert(kBackwardKeys % kRows == 0 && kBackwardKeys % 2 == 0,
              "rows and pairs must tile the keys");

// Element (b, h, t) of a contiguous [B, H, T, D] output.
static inline char* output_row(void* out, DType dtype, int64_t width, int64_t row) {
  return (char*)out + row * width * (dtype == DType::f32 ? 4 : 2);
}

// Sums of dk or dv [keys, row] times a factor, into rows of an output.
static inline void write_sums(const float* sums, int64_t row, int64_t keys, float factor, void* out,
                              DType dtype, int64_t width) {
  for (int64_t j = 0; j < keys; ++j)
    for_vectors(width, [&](auto lane, int64_t d) {
      using F = decltype(lane);
      store_as(output_row(out, dtype, width, j), dtype, d, load<F>(sums + j * row + d) * factor);
    });
}

template <class S>
class Backward {
  using Word = typename S::Word;

 public:
  explicit Backward(const AttentionArgs& a)
      : a_(a),
        score_(a),
        wide_(padded(a.width)),
        row_words_(words<S>(a.width)),
        rows_(scratch<Word>(kTile * wide_)),
        q_turned_(scratch<Word>(row_words_ * kTile)),
        do_turned_(scratch<Word>(row_words_ * kTile)),
        q_rows_(scratch<Word>(kTile * wide_)),
        do_rows_(scratch<Word>(kTile * wide_)),
        p_(scratch<float>(kBackwardKeys * kTile)),
        ds_(scratch<float>(kBackwardKeys * kTile)),
        p_words_(scratch<Word>(kBackwardKeys * kTile)),
        ds_words_(scratch<Word>(kBackwardKeys * kTile)),
        dq_(scratch<float>(wide_ * kTile)) {}

  // Adds to sums [2, Tk, wide]: dk without its scale, then dv.
  void run(const Tile& t, float* sums) {
    const auto q = read_rows(S{}, a_.q, t.b, t.h, t.i, t.n, a_.width, rows_.get());
    turn(q.data, q.row, row_words_, t.n, q_turned_.get());
    score_.pack(q_turned_.get(), row_words_ * kTile);
    const auto q_rows = read_columns(S{}, a_.q, t.b, t.h, t.i, t.n, a_.width, wide_, q_rows_.get());
    Rows<S> do_rows{};
    if (a_.dout.data) {
      const auto dout = read_rows(S{}, a_.dout, t.b, t.h, t.i, t.n, a_.width, rows_.get());
      turn(dout.data, dout.row, row_words_, t.n, do_turned_.get());
      do_rows = read_columns(S{}, a_.dout, t.b, t.h, t.i, t.n, a_.width, wide_, do_rows_.get());
    }
    read_statistics(t);
    memset(dq_.get(), 0, a_.width * kTile * sizeof(float));
    for (int64_t j = t.first; j < t.last; j += kBackwardKeys)
      block(t, j, std::min<int64_t>(kBackwardKeys, t.last - j), q_rows, do_rows, sums);
    if (!a_.dq) return;
    alignas(64) float scale[kTile];
    std::fill_n(scale, kTile, a_.scale);
    const int64_t row = (t.b * a_.heads + t.h) * a_.queries + t.i;
    write_turned(dq_.get(), scale, t.n, a_.width, output_row(a_.dq, a_.q.dtype, a_.width, row),
                 a_.width, a_.q.dtype);
  }

 private:
  // lse in powers of two, 0 where no key is seen; delta = sum_d o do - dlse.
  void read_statistics(const Tile& t) {
    const int64_t at = (t.b * a_.heads + t.h) * a_.queries + t.i;
    for (int64_t q = 0; q < kTile; ++q) {
      const float lse = q < t.n ? a_.lse[at + q] : 0.0f;
      lse_[q] = lse == -__builtin_inff() ? 0.0f : lse * kLog2E;
      delta_[q] = q < t.n && a_.dlse ? -a_.dlse[at + q] : 0.0f;
      if (q >= t.n || !a_.dout.data) continue;
      const char* o = row_at(a_.o, t.b, t.h, t.i + q);
      const char* dout = row_at(a_.dout, t.b, t.h, t.i + q);
      vf lanes{};
      float tail = 0.0f;
      for_vectors(a_.width, [&](auto lane, int64_t d) {
        using F = decltype(lane);
        const F product = load_as<F>(o, a_.o.dtype, d) * load_as<F>(dout, a_.dout.dtype, d);
        if constexpr (traits<F>::lanes > 1) {
          lanes += product;
        } else {
          tail += product;
        }
      });
      delta_[q] += sum_lanes(lanes) + tail;
    }
  }

  void block(const Tile& t, int64_t j, int64_t keys, const Rows<S>& q_rows, const Rows<S>& do_rows,
             float* sums) {
    const int64_t kv_head = t.h / a_.group(), vectors = t.vectors;
    const bool all = t.sees_all(a_, j, keys);
    const auto k = read_rows(S{}, a_.k, t.b, kv_head, j, keys, a_.width, rows_.get());
    product_by_key<S>(t, all, j, keys,
                      {k.data, k.row, 1, q_turned_.get(), kTile, p_.get(), kTile, row_words_});
    if (a_.dout.data) {
      const auto v = read_rows(S{}, a_.v, t.b, kv_head, j, keys, a_.width, rows_.get());
      product_by_key<S>(t, all, j, keys,
                        {v.data, v.row, 1, do_turned_.get(), kTile, ds_.get(), kTile, row_words_});
    }
    score_.cap(p_.get(), keys, vectors);
    if (!all) hide(a_, t, j, keys, p_.get());
    score_.is_unit() ? (all ? score_gradients<false, true>(keys, vectors)
                            : score_gradients<true, true>(keys, vectors))
                     : (all ? score_gradients<false, false>(keys, vectors)
                            : score_gradients<true, false>(keys, vectors));
    const int64_t lanes = wide_ / kLanes, steps = words<S>(t.n), row = kTile / S::kPer;
    if (a_.dv && a_.dout.data) {
      const Word* p = along_queries(S{}, p_.get(), keys, vectors, p_words_.get());
      float* dv = sums + (a_.keys + j) * wide_;
      product_over_queries<S>(t, all, j, keys,
                              {p, row, 1, do_rows.data, do_rows.row, dv, wide_, steps}, lanes);
    }
    if (a_.dk) {
      const Word* ds = along_queries(S{}, ds_.get(), keys, vectors, ds_words_.get());
      float* dk = sums + j * wide_;
      product_over_queries<S>(t, all, j, keys,
                              {ds, row, 1, q_rows.data, q_rows.row, dk, wide_, steps}, lanes);
    }
    if (a_.dq) {
      const auto k =
          read_columns(S{}, a_.k, t.b, kv_head, j, keys, a_.width, a_.width, rows_.get());
      const Word* ds = along_keys(S{}, ds_.get(), keys, vectors, ds_words_.get());
      product_over_keys<S>(t, all, j, keys,
                           {k.data, 1, k.row, ds, kTile, dq_.get(), kTile, words<S>(keys)},
                           a_.width);
    }
  }

  // Scores in p_ to probabilities, dP in ds_ to dS, gradients of the scaled products.
  template <bool kMasked, bool kUnit>
  void score_gradients(int64_t keys, int64_t vectors) {
    const vf factor = splat<vf>(score_.factor);
    for (int64_t v = 0; v < vectors; ++v) {
      const vf lse = load<vf>(lse_ + v * kLanes), delta = load<vf>(delta_ + v * kLanes);
      for (int64_t row = 0; row < keys; ++row) {
        const int64_t at = row * kTile + v * kLanes;
        const vf x = load<vf>(p_.get() + at);
        vf p = exp2_nonpositive(minus<kUnit>(x, factor, lse));
        if constexpr (kMasked) p = select(x == kHidden, vf{}, p);
        const vf dp = a_.dout.data ? load<vf>(ds_.get() + at) : vf{};
        vf ds = p * (dp - delta);
        if constexpr (!kUnit) {
          if (score_.is_capped) ds = ds * fma(-x, x, splat<vf>(1.0f));
        }
        if constexpr (kMasked) ds = select(x == kHidden, vf{}, ds);  // dP may be unwritten there
        store<vf>(p_.get() + at, p);
        store<vf>(ds_.get() + at, ds);
      }
    }
  }

  const AttentionArgs& a_;
  Scores<S> score_;
  int64_t wide_, row_words_;
  Scratch<Word> rows_, q_turned_, do_turned_, q_rows_, do_rows_;
  Scratch<float> p_, ds_;
  Scratch<Word> p_words_, ds_words_;
  Scratch<float> dq_;
  alignas(64) float lse_[kTile], delta_[kTile];
};

template <class S>
static void backward_tasks(const AttentionArgs& a, int64_t begin, int64_t end) {
  Backward<S> backward(a);
  const int64_t wide = padded(a.width), size = a.keys * wide, tiles = a.tiles();
  const Scratch<float> own = scratch<float>(a.partial ? 1 : 2 * size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / a.parts, part = task % a.parts;
    const int64_t b = pair / a.kv_heads, kv_head = pair % a.kv_heads;
    float* sums = a.partial ? a.partial + task * 2 * size : own.get();
    memset(sums, 0, 2 * size * sizeof(float));
    for (int64_t h = kv_head * a.group(); h < (kv_head + 1) * a.group(); ++h)
      for (int64_t i = part; i < tiles; i += a.parts)
        backward.run(Tile(a, b, h, from_both_ends(i, tiles)), sums);
    if (a.partial) continue;
    const int64_t row = pair * a.keys;
    if (a.dk)
      write_sums(sums, wide, a.keys, a.scale, output_row(a.dk, a.q.dtype, a.width, row), a.q.dtype,
                 a.width);
    if (a.dv)
      write_sums(sums + size, wide, a.keys, 1.0f, output_row(a.dv, a.q.dtype, a.width, row),
                 a.q.dtype, a.width);
  }
}

static inline void sum_parts(const AttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t wide = padded(a.width), size = a.keys * wide;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / a.keys, j = task % a.keys;
    float* first = a.partial + pair * a.parts * 2 * size + j * wide;
    for (int64_t half = 0; half < 2; ++half, first += size) {
      for (int64_t part = 1; part < a.parts; ++part)
        for_vectors(wide, [&](auto lane, int64_t d) {
          using F = decltype(lane);
          const F more = load<F>(first + part * 2 * size + d);
          store<F>(first + d, load<F>(first + d) + more);
        });
      void* out = half ? a.dv : a.dk;
      if (out)
        write_sums(first, wide, 1, half ? 1.0f : a.scale, output_row(out, a.q.dtype, a.width, task),
                   a.q.dtype, a.width);
    }
  }
}

}  // namespace GM_ISA
}  // namespace gm
