// A part of the keys of a head at a time, three passes: scores as products with lanes over D, p
// with lanes over the keys, and sums of p v with lanes over D again. Each row of queries takes the
// keys that it sees and none else.
#include "common/head_rows.h"
#include "decode/decode.h"

namespace gm {
namespace GM_ISA {

constexpr int64_t kStreams = 4;
constexpr int64_t kStreamed = 64;  // keys that are taken in streams come in multiples of it
static_assert(kStreamed % (kStreams * kLanes) == 0, "vectors must tile the streams");

// How rows of a dtype are read: a load gives kPer vectors of float32. Where kPer is 2 these are the
// even and the odd elements, and the queries and sums have the same order.
struct Single {
  using Word = float;
  static constexpr int kPer = 1;
  static void read(const float* p, vf* x) { x[0] = load<vf>(p); }
};
struct Brain {
  using Word = uint16_t;
  static constexpr int kPer = 2;
  static void read(const uint16_t* p, vf* x) {
    vu pairs;
    memcpy(&pairs, p, sizeof(pairs));
    x[0] = (vf)(pairs << 16);
    x[1] = (vf)(pairs & 0xffff0000u);
  }
};
struct Half {
  using Word = uint16_t;
  static constexpr int kPer = 1;
  static void read(const uint16_t* p, vf* x) {
    vu16 h;
    memcpy(&h, p, sizeof(h));
    x[0] = from_f16(h);
  }
};

// Single, with the next page of each stream fetched ahead.
struct SingleAhead : Single {};

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own intrinsics

// Lane i is the sum of the lanes of x[i].
static inline vf sum_each(const vf* x) {
#if defined(__AVX512F__)
  __m512 s[8], u[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    s[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)s[2 * i], b = (__m512d)s[2 * i + 1];
    u[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
  }
  // A lane of 128 bits of u[i] holds a part of the sums 4 i .. 4 i + 3.
  const __m512 a = _mm512_shuffle_f32x4(u[0], u[1], 0x44) + _mm512_shuffle_f32x4(u[0], u[1], 0xee);
  const __m512 b = _mm512_shuffle_f32x4(u[2], u[3], 0x44) + _mm512_shuffle_f32x4(u[2], u[3], 0xee);
  return (vf)(_mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd));
#elif defined(__AVX2__)
  __m256 s[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) s[i] = _mm256_hadd_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
  const __m256 a = _mm256_hadd_ps(s[0], s[1]), b = _mm256_hadd_ps(s[2], s[3]);
  return (vf)(_mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31));
#else
  vf sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = sum_lanes(x[i]);
  return sums;
#endif
}

#pragma GCC diagnostic pop

// In which order keys are taken: four streams side by side, which keep more of the memory busy than
// one does, or one key after the other. Elements from one of four keys to the next, and from four
// to the next four.
struct Steps {
  int64_t key, four;
};

// Hardware prefetchers stop at the end of a page and start anew in the next one after misses. The
// first kHead bytes of each page are fetched to the second-level cache while the page before it is
// read, where rows lie without gaps.
constexpr int64_t kPage = 4096, kHead = 512;

template <class E>
static inline bool is_head(const void* row) {
  return std::is_same_v<E, SingleAhead> && (uintptr_t)row % kPage < kHead;
}

// Inlined always: GCC drops calls of a function that does nothing but prefetch.
template <class Word>
[[gnu::always_inline]] static inline void prefetch_next_page(const Word* row) {
  __builtin_prefetch((const char*)row + kPage, 0, 2);
}

// q k of the n <= kLanes keys from `k` on; further lanes hold the first key's.
template <class E>
static inline vf products(const float* q, const typename E::Word* k, Steps steps, int64_t n,
                          int64_t width) {
  vf sums[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const typename E::Word* at[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t key = i + j < n ? i + j : 0;
      at[j] = k + key / 4 * steps.four + key % 4 * steps.key;
    }
    vf sum[4] = {};
    const bool head = is_head<E>(at[0]);
    for (int64_t d = 0; d < width; d += E::kPer * kLanes) {
      if (head) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) prefetch_next_page(at[j] + d);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        vf x[E::kPer];
        E::read(at[j] + d, x);
#pragma GCC unroll 2
        for (int c = 0; c < E::kPer; ++c) sum[j] = fma(x[c], load<vf>(q + d + c * kLanes), sum[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[i + j] = sum[j];
  }
  return sum_each(sums);
}

// sum += p v; head: of a page
template <class E, int kLoads>
static inline void add_row(float p, const typename E::Word* v, bool head, vf* sum) {
  if (head) {
#pragma GCC unroll 8
    for (int l = 0; l < kLoads; ++l) prefetch_next_page(v + l * E::kPer * kLanes);
  }
  const vf weight = splat<vf>(p);
#pragma GCC unroll 8
  for (int l = 0; l < kLoads; ++l) {
    vf x[E::kPer];
    E::read(v + l * E::kPer * kLanes, x);
#pragma GCC unroll 2
    for (int c = 0; c < E::kPer; ++c)
      sum[l * E::kPer + c] = fma(x[c], weight, sum[l * E::kPer + c]);
  }
}

// Adds to as many loads of out the sum over n keys of p v.
template <class E, int kLoads>
static inline void add_columns(const float* p, const typename E::Word* v, Steps steps, int64_t n,
                               float* out) {
  vf sum[kLoads * E::kPer];
#pragma GCC unroll 8
  for (int c = 0; c < kLoads * E::kPer; ++c) sum[c] = load<vf>(out + c * kLanes);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4, v += steps.four) {
    const bool head = is_head<E>(v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) add_row<E, kLoads>(p[j + i], v + i * steps.key, head, sum);
  }
  for (; j < n; ++j, v += steps.key) add_row<E, kLoads>(p[j], v, false, sum);
#pragma GCC unroll 8
  for (int c = 0; c < kLoads * E::kPer; ++c) store<vf>(out + c * kLanes, sum[c]);
}

template <class E, int kLoads = 8 / E::kPer>
static inline void add_values(const float* p, const typename E::Word* v, Steps steps, int64_t n,
                              int64_t width, float* out) {
  constexpr int kStep = kLoads * E::kPer * kLanes;
  for (; width >= kStep; width -= kStep, v += kStep, out += kStep)
    add_columns<E, kLoads>(p, v, steps, n, out);
  if constexpr (kLoads > 1) add_values<E, kLoads / 2>(p, v, steps, n, width, out);
}

// Whether elements stand in the order of Brain's loads.
static inline bool is_split(const DecodeArgs& a) {
  return a.k.dtype == DType::bf16 && a.width % (2 * kLanes) == 0;
}

// x[0..n) to that order, or back.
template <bool kBack>
static inline void reorder(float* x, int64_t n) {
  for (int64_t at = 0; at < n; at += 2 * kLanes) {
    float from[2 * kLanes];
    memcpy(from, x + at, sizeof(from));
    for (int i = 0; i < kLanes; ++i)
      for (int odd = 0; odd < 2; ++odd) {
        const int apart = odd * kLanes + i, beside = 2 * i + odd;
        x[at + (kBack ? beside : apart)] = from[kBack ? apart : beside];
      }
  }
}

class Parts {
 public:
  explicit Parts(const DecodeArgs& a)
      : a_(a),
        rows_(a.rows()),
        width_((a.width + kLanes - 1) / kLanes * kLanes),
        wide_(padded(a.width)),
        queries_(scratch<float>(a.rows() * wide_)),
        scores_(scratch<float>(a.rows() * kPart)),
        staged_(scratch<float>(kLanes * wide_)) {
    const bool is_capped = a.softcap > 0.0f;
    scale_ = is_capped ? a.scale / a.softcap : a.scale * kLog2E;
    cap_ = is_capped ? a.softcap * kLog2E : 0.0f;
  }

  void run(int64_t b, int64_t kv_head, int64_t n) {
    if (b != b_ || kv_head != kv_head_) pack(b, kv_head);
    const int64_t begin = (a_.first_part(b) + n) * kPart;
    first_ = std::max(begin, a_.first_key(b, 0));
    count_ = std::min(begin + kPart, a_.lengths[b]) - first_;
    streamed_ = 0;
    if (a_.k.dtype == DType::f32 && a_.first_key(b, a_.queries - 1) <= first_) {
      const int64_t shared = std::clamp<int64_t>(a_.last_key(b, 0) - first_, 0, count_);
      streamed_ = shared / kStreamed * kStreamed;
    }
    blocks(a_.k, kLanes, [&](auto e, const auto* k, Steps steps, int64_t j, int64_t keys) {
      for (int64_t r = 0; r < rows_; ++r) {
        const vf s = products<decltype(e)>(query(r), k, steps, keys, width_);
        store<vf>(scores(r) + j, cap_ > 0.0f ? tanh(s) * cap_ : s);
      }
    });
    for (int64_t r = 0; r < rows_; ++r) {
      softmax(r, a_.statistics(b, kv_head, n, r));
      memset(a_.values(b, kv_head, n, r), 0, wide_ * sizeof(float));
    }
    const int64_t block = rows_ == 1 ? kPart : kLanes;
    blocks(a_.v, block, [&](auto e, const auto* v, Steps steps, int64_t j, int64_t keys) {
      for (int64_t r = 0; r < rows_; ++r) {
        const Keys seen = seen_by(r);
        const int64_t from = std::max(seen.first, j), to = std::min(seen.last, j + keys);
        if (from < to)
          add_values<decltype(e)>(scores(r) + from, v + (from - j) * steps.key, steps, to - from,
                                  width_, a_.values(b, kv_head, n, r));
      }
    });
  }

 private:
  // Keys of the part that a row of queries sees, counted from first_.
  struct Keys {
    int64_t first, last;
  };
  Keys seen_by(int64_t row) const {
    const int64_t i = row % a_.queries;
    return {std::clamp<int64_t>(a_.first_key(b_, i) - first_, 0, count_),
            std::clamp<int64_t>(a_.last_key(b_, i) - first_, 0, count_)};
  }

  float* query(int64_t row) const { return queries_.get() + row * wide_; }
  float* scores(int64_t row) const { return scores_.get() + row * kPart; }

  // The queries as float32, times what takes products to powers of two or to what tanh() gets.
  void pack(int64_t b, int64_t kv_head) {
    b_ = b;
    kv_head_ = kv_head;
    const int64_t group = a_.heads / a_.kv_heads;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t head = kv_head * group + r / a_.queries;
      float* out = query(r);
      load_row(row_at(a_.q, b, head, r % a_.queries), a_.q.dtype, a_.width, wide_, out);
      for (int64_t d = 0; d < wide_; d += kLanes) store<vf>(out + d, load<vf>(out + d) * scale_);
      if (is_split(a_)) reorder<false>(out, a_.width);
    }
  }

  // body(E{}, rows, steps, j, n) for blocks of n <= `block` keys from the j-th on, in their order.
  template <class Body>
  void blocks(const Heads& x, int64_t block, const Body& body) {
    if (x.dtype == DType::f32) return blocks_of<Single>(x, block, body);
    if (x.dtype == DType::bf16) return blocks_of<Brain>(x, block, body);
    return blocks_of<Half>(x, block, body);
  }

  template <class E, class Body>
  void blocks_of(const Heads& x, int64_t block, const Body& body) {
    const Steps streams{streamed_ / kStreams * x.row, x.row};
    const bool ahead = x.row == a_.width;
    using Streamed = std::conditional_t<std::is_same_v<E, Single>, SingleAhead, E>;
    ahead ? run_blocks<Streamed>(x, block, 0, streamed_, streams, body)
          : run_blocks<E>(x, block, 0, streamed_, streams, body);
    run_blocks<E>(x, block, streamed_, count_, {x.row, 4 * x.row}, body);
  }

  // Rows are read in place if loads tile them, but converted once if several queries read them.
  template <class E, class Body>
  void run_blocks(const Heads& x, int64_t block, int64_t begin, int64_t end, Steps steps,
                  const Body& body) {
    const bool tiles = a_.width % (E::kPer * kLanes) == 0;
    const bool in_place = tiles && (x.dtype == DType::f32 || rows_ == 1);
    const int64_t step = in_place ? block : kLanes;
    const auto* rows = (const typename E::Word*)row_at(x, b_, kv_head_, first_ + begin);
    for (int64_t j = begin; j < end; j += step, rows += step / 4 * steps.four) {
      const int64_t n = std::min(step, end - j);
      if (in_place) {
        body(E{}, rows, steps, j, n);
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        const auto* row = rows + i / 4 * steps.four + i % 4 * steps.key;
        float* out = staged_.get() + i * wide_;
        if (tiles) {
          for (int64_t d = 0; d < a_.width; d += E::kPer * kLanes) {
            vf parts[E::kPer];
            E::read(row + d, parts);
            memcpy(out + d, parts, sizeof(parts));
          }
        } else {
          load_row(row, x.dtype, a_.width, wide_, out);
        }
      }
      body(Single{}, (const float*)staged_.get(), Steps{wide_, 4 * wide_}, j, n);
    }
  }

  // Scores to p, exactly 0 where a key is not seen; the row's maximum and sum.
  void softmax(int64_t row, float* out) {
    const Keys seen = seen_by(row);
    float* s = scores(row);
    for (int64_t j = 0; j < seen.first; ++j) s[j] = kHidden;
    const int64_t end = (count_ + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = seen.last; j < end; ++j) s[j] = kHidden;
    vf tops = splat<vf>(kHidden);
    for (int64_t j = 0; j < end; j += kLanes) tops = larger(load<vf>(s + j), tops);
    const float top = max_lanes(tops);
    vf sum{};
    for (int64_t j = 0; j < end; j += kLanes) {
      const vf x = max_keeping_nan(load<vf>(s + j), kHidden);  // exp2() takes no -inf
      const vf p = select(x == kHidden, vf{}, exp2_nonpositive(x - top));
      sum += p;
      store<vf>(s + j, p);
    }
    out[kTop] = top;
    out[kSum] = sum_lanes(sum);
  }

  const DecodeArgs& a_;
  int64_t rows_;          // of queries that share a key head
  int64_t width_, wide_;  // D in whole vectors, and padded(D)
  Scratch<float> queries_, scores_, staged_;
  float scale_, cap_;
  int64_t b_ = -1, kv_head_ = -1;  // whose queries are packed
  int64_t first_ = 0, count_ = 0;  // the keys of the part
  int64_t streamed_ = 0;           // of them, from first_ on, taken in four streams
};

static void run_parts(const DecodeArgs& a, int64_t begin, int64_t end) {
  Parts parts(a);
  int64_t b = 0;
  for (int64_t task = begin; task < end; ++task) {
    while (a.parts[b + 1] * a.kv_heads <= task) ++b;
    const int64_t n = task - a.parts[b] * a.kv_heads;
    parts.run(b, n / a.parts_of(b), n % a.parts_of(b));
  }
}

static void join_parts(const DecodeArgs& a, int64_t begin, int64_t end) {
  const int64_t wide = padded(a.width), group = a.heads / a.kv_heads;
  const Scratch<float> sums = scratch<float>(wide);
  float* o = sums.get();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t i = task % a.queries, pair = task / a.queries;
    const int64_t b = pair / a.heads, head = pair % a.heads;
    const int64_t kv_head = head / group, row = head % group * a.queries + i;
    float top = kHidden, sum = 0.0f;
    for (int64_t n = 0; n < a.parts_of(b); ++n)
      top = std::max(top, a.statistics(b, kv_head, n, row)[kTop]);
    memset(o, 0, wide * sizeof(float));
    for (int64_t n = 0; n < a.parts_of(b); ++n) {
      const float *part = a.values(b, kv_head, n, row), *statistics = part + wide;
      const float weight = exp2_nonpositive(statistics[kTop] - top);
      sum += weight * statistics[kSum];
      for (int64_t d = 0; d < wide; d += kLanes)
        store<vf>(o + d, fma(load<vf>(part + d), splat<vf>(weight), load<vf>(o + d)));
    }
    if (is_split(a)) reorder<true>(o, a.width);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    char* out = (char*)a.o_out + task * a.width * (a.q.dtype == DType::f32 ? 4 : 2);
    for_vectors(a.width, [&](auto lane, int64_t d) {
      using F = decltype(lane);
      store_as<F>(out, a.q.dtype, d, load<F>(o + d) * inverse);
    });
  }
}

extern const DecodeTable decode_table = {run_parts, join_parts};

}  // namespace GM_ISA
}  // namespace gm
