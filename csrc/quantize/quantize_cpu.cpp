#include <algorithm>
#include <cmath>
#include <vector>

#include "common/block.h"
#include "common/product.h"
#include "quantize/quantize.h"

namespace gm {
namespace GM_ISA {

constexpr int kCodes = 24;  // of a block of scores [kCodes, kSearchRows]
constexpr int kTiles = 4;   // tasks in turn that share a block of codes
static_assert(kSearchRows % (kLanes * kColumns) == 0 && kCodes % kRows == 0, "tiles of products");

using vf8 = vec_of<float, 8>::type;
using vd8 = vec_of<double, 8>::type;

struct alignas(64) Line {
  float data[16];
};

// Floats on cache lines.
class Floats {
 public:
  explicit Floats(int64_t count) : lines_((count + 15) / 16) {}
  float* get() { return lines_.data()->data; }

 private:
  std::vector<Line> lines_;
};

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static void widen_row(const Operand& x, int64_t row, int64_t width, float* out) {
  Buffer buffer;
  for (int64_t d = 0; d < width; d += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, width - d);
    memcpy(out + d, load_block(x, row, d, n, buffer), n * sizeof(float));
  }
}

static void widen(const Operand& x, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; ++row) widen_row(x, row, width, out + row * width);
}

static vd8 eight(const float* x) {
  vf8 part;
  memcpy(&part, x, sizeof(part));
  return __builtin_convertvector(part, vd8);
}

// sum_d (x_d - c_d)^2, or sum_d x_d^2 without c, in float64 and in one order on every machine.
static double distance(const float* x, const float* c, int64_t width) {
  vd8 sums{};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8) {
    const vd8 term = c ? eight(x + d) - eight(c + d) : eight(x + d);
    sums += term * term;
  }
  for (int i = 0; d + i < width; ++i) {
    const double term = c ? (double)x[d + i] - (double)c[d + i] : (double)x[d + i];
    sums[i] += term * term;
  }
  for (int half = 4; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

static double half_norms(const float* codes, int64_t count, int64_t width, float* half) {
  double longest = 0.0;
  for (int64_t k = 0; k < count; ++k) {
    const double square = distance(codes + k * width, nullptr, width);
    half[k] = (float)(0.5 * square);
    if (square > longest) longest = square;
  }
  return std::sqrt(longest);
}

// The nearest code by float64 distances: for rows whose two best scores are as close as rounding.
static int64_t search_exactly(const SearchArgs& a, const float* row) {
  double best = __builtin_inf();
  int64_t nearest = 0;
  for (int64_t k = 0; k < a.count; ++k) {
    const double found = distance(row, a.codes + k * a.width, a.width);
    if (found < best) best = found, nearest = k;
  }
  return nearest;
}

// kSearchRows rows [begin, begin + n), turned, and what they have seen so far of the scores
// |c_k|^2 / 2 - x c_k.
struct Tile {
  int64_t begin, n, vectors;
  float* turned;                          // [D, kSearchRows], zeros for lanes from n on
  alignas(64) float square[kSearchRows];  // |x|^2
  alignas(64) float best[kSearchRows], second[kSearchRows];
  alignas(64) int32_t index[kSearchRows];
};

class Search {
 public:
  explicit Search(const SearchArgs& a)
      : a_(a),
        wide_(round_up(a.width, 4)),
        rows_(kLanes * wide_),
        turned_(kTiles * kSearchRows * wide_),
        scores_(kCodes * kSearchRows) {}

  // Tasks [first, first + count), count <= kTiles: each block of codes is read once for all.
  void run(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) turn(first + i, i);
    for (int64_t k = 0; k < a_.count; k += kCodes) {
      const int64_t codes = std::min<int64_t>(kCodes, a_.count - k);
      for (int64_t i = 0; i < count; ++i) {
        multiply(tiles_[i], k, codes);
        for (int64_t v = 0; v < tiles_[i].vectors; ++v) compare(tiles_[i], k, codes, v * kLanes);
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t lane = 0; lane < tiles_[i].n; ++lane)
        a_.indices[tiles_[i].begin + lane] = decide(tiles_[i], lane);
  }

 private:
  void turn(int64_t task, int64_t place) {
    Tile& t = tiles_[place];
    t.begin = task * kSearchRows;
    t.n = std::min<int64_t>(kSearchRows, a_.rows - t.begin);
    t.vectors = (t.n + kLanes - 1) / kLanes;
    t.turned = turned_.get() + place * kSearchRows * wide_;
    for (int64_t i = 0; i < t.vectors * kLanes; i += kLanes) {
      for (int64_t r = 0; r < kLanes; ++r) {
        float* row = rows_.get() + r * wide_;
        const int64_t filled = i + r < t.n ? a_.width : 0;
        widen_row(a_.x, t.begin + i + r, filled, row);
        memset(row + filled, 0, (wide_ - filled) * sizeof(float));
      }
      vf square{};
      for (int64_t d = 0; d < wide_; d += 4) {
        vf x[4];
        load_columns4(rows_.get() + d, wide_, x);
        for (int j = 0; j < 4; ++j) {
          store<vf>(t.turned + (d + j) * kSearchRows + i, x[j]);
          square = fma(x[j], x[j], square);
        }
      }
      store<vf>(t.square + i, square);
      store<vf>(t.best + i, splat<vf>(__builtin_inff()));
      store<vf>(t.second + i, splat<vf>(__builtin_inff()));
      memset(t.index + i, 0, sizeof(vi));
    }
  }

  // scores[c][i] = x_i c_{k + c}.
  void multiply(const Tile& t, int64_t k, int64_t codes) {
    Product<Single> p;
    p.a = a_.codes + k * a_.width;
    p.a_row = p.steps = a_.width;
    p.a_step = 1;
    p.b = t.turned;
    p.b_step = p.c_row = kSearchRows;
    p.c = scores_.get();
    product<Single, false>(p, codes, t.vectors);
  }

  // The best and the second best of lanes [at, at + kLanes) after codes [k, k + codes). NaN is
  // never below anything.
  void compare(Tile& t, int64_t k, int64_t codes, int64_t at) {
    vf best = load<vf>(t.best + at), second = load<vf>(t.second + at);
    vi index;
    memcpy(&index, t.index + at, sizeof(index));
    for (int64_t c = 0; c < codes; ++c) {
      const vf s = a_.half[k + c] - load<vf>(scores_.get() + c * kSearchRows + at);
      const vi less = s < best;
      second = select(less, best, select(s < second, s, second));
      best = select(less, s, best);
      index = less ? vi{} + (int32_t)(k + c) : index;
    }
    store<vf>(t.best + at, best);
    store<vf>(t.second + at, second);
    memcpy(t.index + at, &index, sizeof(index));
  }

  // The index found, unless rounding could have chosen it: then by exact distances.
  int64_t decide(const Tile& t, int64_t lane) {
    const double reach = (std::sqrt((double)t.square[lane]) + a_.longest) * a_.longest;
    const double error = ((double)a_.width + 4) * 0x1p-24 * reach + (double)a_.width * 0x1p-125;
    const double gap = (double)t.second[lane] - (double)t.best[lane];
    if (reach < 0x1p126 && gap > 2 * error) return t.index[lane];  // not so if anything is NaN
    widen_row(a_.x, t.begin + lane, a_.width, rows_.get());
    return search_exactly(a_, rows_.get());
  }

  const SearchArgs& a_;
  const int64_t wide_;
  Floats rows_, turned_, scores_;
  Tile tiles_[kTiles];
};

static void search(const SearchArgs& a, int64_t begin, int64_t end) {
  Search search(a);
  for (int64_t task = begin; task < end; task += kTiles)
    search.run(task, std::min<int64_t>(kTiles, end - task));
}

static void sum_rows(const SumArgs& a, int64_t begin, int64_t end) {
  Buffer buffer;
  double sums[kBlock];
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t d = 0; d < a.width; d += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, a.width - d);
      std::fill(sums, sums + n, 0.0);
      for (int64_t j = a.starts[k]; j < a.starts[k + 1]; ++j) {
        const float* x = load_block(a.x, a.order[j], d, n, buffer);
        for (int64_t i = 0; i < n; ++i) sums[i] += (double)x[i];
      }
      for (int64_t i = 0; i < n; ++i) a.sums[k * a.width + d + i] = (float)sums[i];
    }
  }
}

extern const QuantizeTable quantize_table = {half_norms, widen, search, sum_rows};

}  // namespace GM_ISA
}  // namespace gm
