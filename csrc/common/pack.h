// How blocks of heads are laid out for the products: rows brought to words, tiles turned so that
// lanes run over queries, and results turned back.
#pragma once

#include <algorithm>

#include "common/block.h"
#include "common/head_rows.h"
#include "common/heads.h"
#include "common/product.h"

namespace gm {
namespace GM_ISA {

static_assert(kTile % (kLanes * kColumns) == 0, "columns of a product must tile the queries");

// Words that hold n values.
template <class S>
static constexpr int64_t words(int64_t n) {
  return (n + S::kPer - 1) / S::kPer;
}

// A block of rows as words along D, for the A side of a product.
template <class S>
struct Rows {
  const typename S::Word* data;
  int64_t row;  // words
};

// Rows [t, t + n): in place where their memory is words already, else copied to the buffer
// [n, words of D].
static inline Rows<Single> read_rows(Single, const Heads& x, int64_t b, int64_t h, int64_t t,
                                     int64_t n, int64_t width, float* buffer) {
  if (x.dtype == DType::f32) return {(const float*)row_at(x, b, h, t), x.row};
  for (int64_t i = 0; i < n; ++i)
    load_row(row_at(x, b, h, t + i), x.dtype, width, width, buffer + i * width);
  return {buffer, width};
}

#if defined(__AVX512BF16__)
static inline Rows<Pairs> read_rows(Pairs, const Heads& x, int64_t b, int64_t h, int64_t t,
                                    int64_t n, int64_t width, uint32_t* buffer) {
  if (width % 2 == 0 && x.row % 2 == 0) return {(const uint32_t*)row_at(x, b, h, t), x.row / 2};
  const int64_t row = words<Pairs>(width);
  for (int64_t i = 0; i < n; ++i) {
    buffer[i * row + row - 1] = 0;
    memcpy(buffer + i * row, row_at(x, b, h, t + i), width * 2);
  }
  return {buffer, row};
}

// Two rows of n floats as one row of words: the values of the first are the lower halves.
static inline __m512i pair_words(__m512 low, __m512 high) {
  const __m256i l = (__m256i)_mm512_cvtneps_pbh(low), h = (__m256i)_mm512_cvtneps_pbh(high);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(l), _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static inline void interleave_rows(const uint16_t* low, const uint16_t* high, int64_t n, int64_t to,
                                   uint32_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i l = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + i)));
    const __m512i h = high ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + i)))
                           : _mm512_setzero_si512();
    _mm512_storeu_si512(out + i, _mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
  }
  for (; i < n; ++i) out[i] = low[i] | (high ? (uint32_t)high[i] << 16 : 0u);
  for (; i < to; ++i) out[i] = 0;
}
#endif

// Rows [t, t + n) as words along T: row k of the result holds values k of each word, D padded to
// `to`. For the A side (k over keys) and for the B side (k over queries). Single rows are in place
// where nothing is to be padded.
static inline Rows<Single> read_columns(Single, const Heads& x, int64_t b, int64_t h, int64_t t,
                                        int64_t n, int64_t width, int64_t to, float* buffer) {
  if (x.dtype == DType::f32 && width == to) return {(const float*)row_at(x, b, h, t), x.row};
  for (int64_t i = 0; i < n; ++i)
    load_row(row_at(x, b, h, t + i), x.dtype, width, to, buffer + i * to);
  return {buffer, to};
}

#if defined(__AVX512BF16__)
static inline Rows<Pairs> read_columns(Pairs, const Heads& x, int64_t b, int64_t h, int64_t t,
                                       int64_t n, int64_t width, int64_t to, uint32_t* buffer) {
  for (int64_t i = 0; i < n; i += 2) {
    const uint16_t* low = (const uint16_t*)row_at(x, b, h, t + i);
    const uint16_t* high = i + 1 < n ? (const uint16_t*)row_at(x, b, h, t + i + 1) : nullptr;
    interleave_rows(low, high, width, to, buffer + i / 2 * to);
  }
  return {buffer, to};
}
#endif

// A block [rows, kTile] of floats as words along its rows, rows / kPer of them, for the B side. An
// odd last row is paired with zeros.
static inline const float* along_keys(Single, const float* x, int64_t, int64_t, float*) {
  return x;
}

// The same block as words along its queries, for the A side: [rows, kTile / kPer].
static inline const float* along_queries(Single, const float* x, int64_t, int64_t, float*) {
  return x;
}

#if defined(__AVX512BF16__)
static inline const uint32_t* along_keys(Pairs, const float* x, int64_t rows, int64_t vectors,
                                         uint32_t* out) {
  for (int64_t j = 0; j < rows; j += 2)
    for (int64_t v = 0; v < vectors; ++v) {
      const float* at = x + j * kTile + v * kLanes;
      const __m512 high = j + 1 < rows ? _mm512_loadu_ps(at + kTile) : _mm512_setzero_ps();
      _mm512_storeu_si512(out + j / 2 * kTile + v * kLanes, pair_words(_mm512_loadu_ps(at), high));
    }
  return out;
}

static inline const uint32_t* along_queries(Pairs, const float* x, int64_t rows, int64_t vectors,
                                            uint32_t* out) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t v = 0; v < vectors; ++v) {
      const __m256bh h = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + j * kTile + v * kLanes));
      _mm256_storeu_si256((__m256i*)(out + (j * kTile + v * kLanes) / 2), (__m256i)h);
    }
  return out;
}
#endif

// out[c][r] = in[r][c] for kLanes rows and columns.
static inline void transpose_lanes(const float* in, int64_t in_row, float* out, int64_t out_row) {
#if defined(__AVX512F__)
  __m512 r[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * in_row);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)s[4 * i], b = (__m512d)s[4 * i + 2];
    const __m512d c = (__m512d)s[4 * i + 1], d = (__m512d)s[4 * i + 3];
    r[4 * i] = (__m512)_mm512_unpacklo_pd(a, b);
    r[4 * i + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    r[4 * i + 2] = (__m512)_mm512_unpacklo_pd(c, d);
    r[4 * i + 3] = (__m512)_mm512_unpackhi_pd(c, d);
  }
  // r[4 g + j] holds column 4 l + j of rows 4 g .. 4 g + 3 in its lane of 128 bits l.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x44);
    const __m512 d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xee);
    _mm512_storeu_ps(out + j * out_row, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(out + (4 + j) * out_row, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(out + (8 + j) * out_row, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(out + (12 + j) * out_row, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
#elif defined(__AVX2__)
  __m256 r[8], s[8];  // r[i]: lower halves of rows i % 4 and i % 4 + 4, then the upper ones
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float *a = in + i * in_row, *b = a + 4 * in_row;
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
    r[4 + i] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a + 4)), _mm_loadu_ps(b + 4), 1);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    s[i + 2] = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
    s[i + 3] = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d a = (__m256d)s[i + j], b = (__m256d)s[i + 2 + j];
      float* at = out + (i + 2 * j) * out_row;
      _mm256_storeu_ps(at, (__m256)_mm256_unpacklo_pd(a, b));
      _mm256_storeu_ps(at + out_row, (__m256)_mm256_unpackhi_pd(a, b));
    }
  }
#else
  for (int c = 0; c < kLanes; ++c)
    for (int r = 0; r < kLanes; ++r) out[c * out_row + r] = in[r * in_row + c];
#endif
}

// A tile [n, row] of words turned to [row, kTile]; queries from n on are zeros. Words are moved as
// floats, whatever they hold.
static inline void turn(const void* tile, int64_t in_row, int64_t row, int64_t n, void* turned) {
  const float* in = (const float*)tile;
  float* out = (float*)turned;
  float part[kLanes * kLanes], part_turned[kLanes * kLanes];
  for (int64_t q = 0; q < kTile; q += kLanes) {
    const int64_t rows = std::clamp<int64_t>(n - q, 0, kLanes);
    for (int64_t d = 0; d < row; d += kLanes) {
      const int64_t columns = std::min<int64_t>(kLanes, row - d);
      if (rows == kLanes && columns == kLanes) {
        transpose_lanes(in + q * in_row + d, in_row, out + d * kTile + q, kTile);
        continue;
      }
      memset(part, 0, sizeof(part));
      for (int64_t i = 0; i < rows; ++i)
        memcpy(part + i * kLanes, in + (q + i) * in_row + d, columns * 4);
      transpose_lanes(part, kLanes, part_turned, kLanes);
      for (int64_t c = 0; c < columns; ++c)
        memcpy(out + (d + c) * kTile + q, part_turned + c * kLanes, sizeof(vf));
    }
  }
}

// Turns x [D, kTile] times `scale` (one a query) back to rows [n, D] of a dtype, `row` elements
// apart.
static inline void write_turned(const float* x, const float* scale, int64_t n, int64_t width,
                                void* out, int64_t row, DType dtype) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  float part[kLanes * kLanes], rows[kLanes * kLanes];
  for (int64_t q = 0; q < n; q += kLanes) {
    const vf factor = load<vf>(scale + q);
    const int64_t count = std::min<int64_t>(kLanes, n - q);
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t columns = std::min<int64_t>(kLanes, width - d);
      for (int64_t c = 0; c < columns; ++c)
        store<vf>(part + c * kLanes, load<vf>(x + (d + c) * kTile + q) * factor);
      char* at = (char*)out + (q * row + d) * size;
      if (dtype == DType::f32 && count == kLanes && columns == kLanes) {
        transpose_lanes(part, kLanes, (float*)at, row);
        continue;
      }
      for (int64_t c = columns; c < kLanes; ++c) store<vf>(part + c * kLanes, vf{});
      transpose_lanes(part, kLanes, rows, kLanes);
      for (int64_t i = 0; i < count; ++i, at += row * size)
        for_vectors(columns, [&](auto lane, int64_t c) {
          store_as(at, dtype, c, load<decltype(lane)>(rows + i * kLanes + c));
        });
    }
  }
}

}  // namespace GM_ISA
}  // namespace gm
