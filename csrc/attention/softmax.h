// Scores of a block of keys to probabilities, lanes = queries: what is hidden, the softcap, the
// running maximum and sum.
#pragma once

#include "attention/pack.h"
#include "common/math.h"

namespace gm {
namespace GM_ISA {

// What queries [i, i + n) of a tile see: [low, high) of each lane, empty for lanes from n on.
struct Tile {
  int64_t b, h, i, n;
  int64_t vectors;  // that hold queries
  alignas(64) int32_t low[kTile], high[kTile];
  int64_t first, last;  // keys that any query may see

  Tile(const AttentionArgs& a, int64_t b, int64_t h, int64_t tile) : b(b), h(h), i(tile * kTile) {
    n = std::min<int64_t>(kTile, a.queries - i);
    vectors = (n + kLanes - 1) / kLanes;
    const int64_t at = b * a.range_stride + i;
    for (int64_t q = 0; q < kTile; ++q) {
      low[q] = q < n ? a.lo[at + q] : 0;
      high[q] = q < n ? a.hi[at + q] : 0;
    }
    first = low[0];
    last = high[n - 1];
  }

  // Vectors [first, last) of queries that may see any of the keys [j, j + count).
  struct Vectors {
    int64_t first, last;
  };
  Vectors seeing(int64_t j, int64_t count) const {
    Vectors found{0, vectors};
    while (found.first < vectors && last_high(found.first) <= j) ++found.first;
    while (found.last > found.first && low[(found.last - 1) * kLanes] >= j + count) --found.last;
    return found;
  }

  // Keys [first, last) of the block [j, j + count), counted from j, that vectors [v, v + some) may
  // see; from an even key on.
  struct Keys {
    int64_t first, last;
  };
  Keys seen(int64_t v, int64_t some, int64_t j, int64_t count) const {
    const int64_t first = std::clamp<int64_t>(low[v * kLanes] - j, 0, count) & ~1;
    return {first, std::clamp<int64_t>(last_high(v + some - 1) - j, first, count)};
  }

  int64_t last_high(int64_t v) const { return high[std::min<int64_t>((v + 1) * kLanes, n) - 1]; }

  // Whether every query sees all of the keys [j, j + count).
  bool sees_all(const AttentionArgs& a, int64_t j, int64_t count) const {
    return !a.key_mask && low[n - 1] <= j && j + count <= high[0];
  }
};

// What becomes of products q k: scale q k, or softcap tanh(scale q k / softcap). Factors of float32
// go into the queries beforehand, so that the largest score of a query is exactly its maximum;
// bfloat16 queries stay as they are.
template <class S>
struct Scores {
  float packed;  // of the queries
  float inner;   // of what tanh() gets
  float factor;  // takes what stands in a block to powers of two
  bool is_capped;

  explicit Scores(const AttentionArgs& a) : is_capped(a.softcap > 0.0f) {
    const float outer = is_capped ? a.softcap * kLog2E : 1.0f;
    const float own = is_capped ? a.scale / a.softcap : a.scale * kLog2E;
    const bool packs = S::kPer == 1;
    packed = packs ? own : 1.0f;
    inner = packs ? 1.0f : own;
    factor = is_capped ? outer : packs ? 1.0f : own;
  }

  // Whether blocks hold powers of two as they are.
  bool is_unit() const { return factor == 1.0f; }

  // Multiplies the turned queries.
  void pack(typename S::Word* turned, int64_t count) const {
    if constexpr (S::kPer == 1) {
      for (int64_t i = 0; i < count; i += kLanes)
        store<vf>(turned + i, load<vf>(turned + i) * packed);
    }
  }

  // A softcap leaves tanh(scale q k / softcap) in the block; without one nothing changes.
  void cap(float* s, int64_t keys, int64_t vectors) const {
    if (!is_capped) return;
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t v = 0; v < vectors; ++v) {
        float* at = s + j * kTile + v * kLanes;
        store<vf>(at, tanh(load<vf>(at) * inner));
      }
  }
};

// x times the factor, less y; without a rounding between them where there is a factor.
template <bool kUnit>
static inline vf minus(vf x, vf factor, vf y) {
  return kUnit ? x - y : fma(x, factor, -y);
}

// The product of a block with lanes over queries, a row a key: where no query of a vector sees any
// key of a tile, nothing is written.
template <class S>
static inline void product_by_key(const Tile& t, bool all, int64_t j, int64_t keys,
                                  const Product<S>& p) {
  if (all) return product<S, false>(p, keys, t.vectors);
  for (int64_t r = 0; r < keys; r += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, keys - r);
    const auto [first, last] = t.seeing(j + r, rows);
    Product<S> tile = p;
    tile.a += r * p.a_row;
    tile.b += first * kLanes;
    tile.c += r * p.c_row + first * kLanes;
    product<S, false>(tile, rows, last - first);
  }
}

// The product that sums over the keys of a block, with lanes over queries: each pair of vectors
// takes the keys that it may see.
template <class S>
static inline void product_over_keys(const Tile& t, bool all, int64_t j, int64_t keys,
                                     const Product<S>& p, int64_t rows) {
  if (all) return product<S, true>(p, rows, t.vectors);
  for (int64_t v = 0; v < t.vectors; v += 2) {
    const int64_t some = std::min<int64_t>(2, t.vectors - v);
    const auto [first, last] = t.seen(v, some, j, keys);
    Product<S> part = p;
    part.a += first / S::kPer * p.a_step;
    part.b += first / S::kPer * p.b_step + v * kLanes;
    part.c += v * kLanes;
    part.steps = words<S>(last - first);
    product<S, true>(part, rows, some);
  }
}

// The product that sums over the queries of a tile, a row a key: each tile of rows takes the
// queries that may see it.
template <class S>
static inline void product_over_queries(const Tile& t, bool all, int64_t j, int64_t keys,
                                        const Product<S>& p, int64_t vectors) {
  if (all) return product<S, true>(p, keys, vectors);
  for (int64_t r = 0; r < keys; r += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, keys - r);
    const auto [first, last] = t.seeing(j + r, rows);
    const int64_t q = first * kLanes / S::kPer;
    Product<S> part = p;
    part.a += r * p.a_row + q;
    part.b += q * p.b_step;
    part.c += r * p.c_row;
    part.steps = std::max<int64_t>(words<S>(std::min<int64_t>(last * kLanes, t.n)) - q, 0);
    product<S, true>(part, rows, vectors);
  }
}

// Puts kHidden where a query does not see key j + row.
static inline void hide(const AttentionArgs& a, const Tile& t, int64_t j, int64_t keys, float* s) {
  const uint8_t* seen = a.key_mask ? a.key_mask + t.b * a.keys + j : nullptr;
  for (int64_t row = 0; row < keys; ++row) {
    const bool dropped = seen && !seen[row];
    for (int64_t v = 0; v < t.vectors; ++v) {
      vi low, high;
      memcpy(&low, t.low + v * kLanes, sizeof(vi));
      memcpy(&high, t.high + v * kLanes, sizeof(vi));
      const vi key = vi{} + (int32_t)(j + row);
      const vi visible = dropped ? vi{} : (vi)((key >= low) & (key < high));
      float* at = s + row * kTile + v * kLanes;
      store<vf>(at, select(visible, load<vf>(at), splat<vf>(kHidden)));
    }
  }
}

// Running maximum (in units of 2^x) and sum of each query.
struct Running {
  alignas(64) float top[kTile], sum[kTile], shrink[kTile];
  Running() {
    for (int q = 0; q < kTile; ++q) {
      top[q] = kHidden;
      sum[q] = 0.0f;
    }
  }
};

// Takes a block of scores in: s becomes probabilities against the new maximum. Returns whether what
// was summed before must be multiplied by shrink.
template <bool kMasked, bool kUnit>
static inline bool softmax_block(float scores_factor, float* s, int64_t keys, int64_t vectors,
                                 Running& run) {
  const vf factor = splat<vf>(scores_factor);
  bool shrinks = false;
  for (int64_t v = 0; v < vectors; ++v) {
    float* column = s + v * kLanes;
    vf top0 = splat<vf>(kHidden), top1 = top0, top2 = top0, top3 = top0;
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4) {
      top0 = larger(load<vf>(column + j * kTile), top0);
      top1 = larger(load<vf>(column + (j + 1) * kTile), top1);
      top2 = larger(load<vf>(column + (j + 2) * kTile), top2);
      top3 = larger(load<vf>(column + (j + 3) * kTile), top3);
    }
    for (; j < keys; ++j) top0 = larger(load<vf>(column + j * kTile), top0);
    const vf before = load<vf>(run.top + v * kLanes);
    const vf top = larger(larger(larger(top0, top1), larger(top2, top3)) * factor, before);
    const vf shrink = exp2_nonpositive(before - top);
    store<vf>(run.top + v * kLanes, top);
    store<vf>(run.shrink + v * kLanes, shrink);
    vf sum = load<vf>(run.sum + v * kLanes) * shrink;
    for (j = 0; j < keys; ++j) {
      const vf x = load<vf>(column + j * kTile);
      vf p = exp2_nonpositive(minus<kUnit>(x, factor, top));
      if constexpr (kMasked) p = select(x == kHidden, vf{}, p);
      sum += p;
      store<vf>(column + j * kTile, p);
    }
    store<vf>(run.sum + v * kLanes, sum);
    const vi same = (vi)(before == top);
    for (int i = 0; i < kLanes; ++i) shrinks |= !same[i];
  }
  return shrinks;
}

}  // namespace GM_ISA
}  // namespace gm
