// The streaming log of a sum of exponentials: lanes = queries, scores come in blocks of keys.
#pragma once

#include "common/head_rows.h"
#include "common/math.h"

namespace gm {
namespace GM_ISA {

// x times the factor, less y; without a rounding between them where there is a factor.
template <bool kUnit>
static inline vf minus(vf x, vf factor, vf y) {
  return kUnit ? x - y : fma(x, factor, -y);
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
