// Sampling of tokens: temperature, top-k, top-p, Gumbel. The arithmetic that every backend shares
// bit for bit is derived in gmkernels/ops/token_sampling/reference.py; names are the same.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/math.h"

namespace gm {

constexpr int64_t kGroup = 64;    // tokens that share a maximum; whole vectors of noise everywhere
constexpr int64_t kBins = 2048;   // of the histogram of log-weights
constexpr int64_t kNoToken = -1;  // of a row from which none can be drawn
constexpr float kLowestLogWeight = -24.0f;

inline int64_t groups_of(int64_t columns) { return (columns + kGroup - 1) / kGroup; }

// A token that may be the last one of the nucleus.
struct Candidate {
  float x;
  double w;
};

// Memory of one thread: a row has C tokens in G groups.
struct SamplingScratch {
  float* x;               // [64 G] a row of 16-bit logits as float32; the last group of any
  float* top;             // [G] largest logit of each group
  float* sorted;          // [max(G, C)] partly sorted by the selection of the k-th largest
  double* mass;           // [kBins]
  Candidate* candidates;  // [C]
};

// One call on logits [B, C].
struct SamplingArgs {
  Operand logits;
  NoiseKey key;
  const int64_t* position;  // [B]
  int64_t columns;
  bool greedy;      // temperature 0
  float sharpness;  // 1 / temperature
  int64_t top_k;    // 0: all
  double share;     // top_p 2^30; 0: all
  int64_t* tokens;  // [B]
};

struct TokenSamplingTable {
  // Draws rows [begin, end).
  void (*next_token)(const SamplingArgs& args, const SamplingScratch& scratch, int64_t begin,
                     int64_t end);
};

GM_KERNEL_TABLE(TokenSamplingTable, token_sampling_table)

namespace GM_ISA {

// exp(d) for d in [-24, 0], in a fixed order without contraction.
template <class F>
GM_HD F exp_fixed(F d) {
  const F n = round_to_integer(d * 1.4426950408889634f);
  const F r = (d - n * 0.693145751953125f) - n * 1.42860676533018518e-06f;
  F q = r * 0.001393575919792056f + 0.008369090966880322f;
  q = q * r + 0.04166645556688309f;
  q = q * r + 0.16666516661643982f;
  q = q * r + 0.5f;
  q = q * r + 1.0f;
  q = q * r + 1.0f;
  return scale_by_power(q, n);
}

// rint(2^33 e), as a double that holds an integer.
GM_HD double fixed_point(float e) { return ((double)e * 0x1p33 + 0x1.8p52) - 0x1.8p52; }

// 2 g - 2 ln 2 of a Gumbel variable g = -ln(-ln(1 - u)). u(~w) is 1 - u(w), and u(w) is the finer
// of the two where 1 - u is near 1.
template <class F, class U>
GM_HD F gumbel(U word) {
  int_of<F> k;
  F f;
  binary_parts(uniform_from(to_float(~word)), k, f);
  return minus_two_ln(minus_two_ln(k, select(k == 0, -uniform_from(to_float(word)), f)));
}

}  // namespace GM_ISA
}  // namespace gm
