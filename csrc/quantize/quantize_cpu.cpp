#include <algorithm>
#include <cmath>
#include <vector>

#include "common/block.h"
#include "common/product.h"
#include "quantize/quantize.h"

namespace gm {
namespace GM_ISA {

constexpr int kCodes = 24;  // of a block of scores [kCodes, kSearchRows]
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

// sum_d (x_d - c_d)^2 in one order on every machine; eight(d) gives both from d on, 0 past the end.
template <class Eight>
static double sum_in_eights(int64_t width, Eight eight) {
  vd8 sums{};
  for (int64_t d = 0; d < width; d += 8) {
    const vd8 term = eight(d, std::min<int64_t>(8, width - d));
    sums += term * term;
  }
  for (int half = 4; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

static vd8 eight_of(const float* x, int64_t n) {
  vf8 part{};
  memcpy(&part, x, n * sizeof(float));
  return __builtin_convertvector(part, vd8);
}

static double half_norms(const float* codes, int64_t count, int64_t width, float* half) {
  double longest = 0.0;
  for (int64_t k = 0; k < count; ++k) {
    const float* code = codes + k * width;
    const double square =
        sum_in_eights(width, [&](int64_t d, int64_t n) { return eight_of(code + d, n); });
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
    const float* code = a.codes + k * a.width;
    const double distance = sum_in_eights(a.width, [&](int64_t d, int64_t n) {
      return eight_of(row + d, n) - eight_of(code + d, n);
    });
    if (distance < best) best = distance, nearest = k;
  }
  return nearest;
}

// What kSearchRows rows have seen so far of scores |c_k|^2 / 2 - x c_k.
struct Running {
  alignas(64) float best[kSearchRows], second[kSearchRows];
  alignas(64) int32_t index[kSearchRows];
  alignas(64) float square[kSearchRows];  // |x|^2
};

class Search {
 public:
  explicit Search(const SearchArgs& a)
      : a_(a),
        wide_(round_up(a.width, 4)),
        rows_(kLanes * wide_),
        turned_(kSearchRows * wide_),
        scores_(kCodes * kSearchRows) {}

  void run(int64_t task) {
    const int64_t begin = task * kSearchRows, n = std::min<int64_t>(kSearchRows, a_.rows - begin);
    const int64_t vectors = (n + kLanes - 1) / kLanes;
    turn(begin, n, vectors);
    for (int64_t k = 0; k < a_.count; k += kCodes) {
      const int64_t codes = std::min<int64_t>(kCodes, a_.count - k);
      product<Single, false>({a_.codes + k * a_.width, a_.width, 1, turned_.get(), kSearchRows,
                              scores_.get(), kSearchRows, a_.width},
                             codes, vectors);
      for (int64_t v = 0; v < vectors; ++v) compare(k, codes, v * kLanes);
    }
    for (int64_t i = 0; i < n; ++i) a_.indices[begin + i] = decide(begin + i, i);
  }

 private:
  // turned[d][i] = x[begin + i][d], and the state before the first code.
  void turn(int64_t begin, int64_t n, int64_t vectors) {
    for (int64_t i = 0; i < vectors * kLanes; i += kLanes) {
      for (int64_t r = 0; r < kLanes; ++r) {
        float* row = rows_.get() + r * wide_;
        const int64_t filled = i + r < n ? a_.width : 0;
        widen_row(a_.x, begin + i + r, filled, row);
        memset(row + filled, 0, (wide_ - filled) * sizeof(float));
      }
      vf square{};
      for (int64_t d = 0; d < wide_; d += 4) {
        vf x[4];
        load_columns4(rows_.get() + d, wide_, x);
        for (int j = 0; j < 4; ++j) {
          store<vf>(turned_.get() + (d + j) * kSearchRows + i, x[j]);
          square = fma(x[j], x[j], square);
        }
      }
      store<vf>(run_.square + i, square);
      store<vf>(run_.best + i, splat<vf>(__builtin_inff()));
      store<vf>(run_.second + i, splat<vf>(__builtin_inff()));
      memset(run_.index + i, 0, sizeof(vi));
    }
  }

  // The best and the second best of lanes [at, at + kLanes) after codes [k, k + codes). NaN is
  // never below anything.
  void compare(int64_t k, int64_t codes, int64_t at) {
    vf best = load<vf>(run_.best + at), second = load<vf>(run_.second + at);
    vi index;
    memcpy(&index, run_.index + at, sizeof(index));
    for (int64_t c = 0; c < codes; ++c) {
      const vf s = a_.half[k + c] - load<vf>(scores_.get() + c * kSearchRows + at);
      const vi less = s < best;
      second = select(less, best, select(s < second, s, second));
      best = select(less, s, best);
      index = less ? vi{} + (int32_t)(k + c) : index;
    }
    store<vf>(run_.best + at, best);
    store<vf>(run_.second + at, second);
    memcpy(run_.index + at, &index, sizeof(index));
  }

  // The index found, unless rounding could have chosen it: then by exact distances.
  int64_t decide(int64_t row, int64_t i) {
    const double reach = (std::sqrt((double)run_.square[i]) + a_.longest) * a_.longest;
    const double error = ((double)a_.width + 4) * 0x1p-24 * reach + (double)a_.width * 0x1p-125;
    const double gap = (double)run_.second[i] - (double)run_.best[i];
    if (reach < 0x1p126 && gap > 2 * error) return run_.index[i];  // not so if anything is NaN
    widen_row(a_.x, row, a_.width, rows_.get());
    return search_exactly(a_, rows_.get());
  }

  const SearchArgs& a_;
  const int64_t wide_;
  Floats rows_, turned_, scores_;
  Running run_;
};

static void search(const SearchArgs& a, int64_t begin, int64_t end) {
  Search search(a);
  for (int64_t task = begin; task < end; ++task) search.run(task);
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
