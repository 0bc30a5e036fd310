// The nearest code of each row, and the sums of the rows of each code. Derivations stand in
// gmkernels/ops/quantize/reference.py; the names are the same there and here.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace gm {

constexpr int kSearchRows = 64;  // rows of a task: lanes of vectors run over them

struct SearchArgs {
  Operand x;                   // [N, D]
  const float* codes;          // [K, D] contiguous
  const float* half;           // [K], half_norms() of the codes
  double longest;              // norm of the longest code; codes that are not finite do not count
  int64_t rows, count, width;  // N, K, D
  int64_t* indices;            // [N]
};

struct SumArgs {
  Operand x;              // [N, D]
  const int64_t* order;   // [N], rows by code, ascending within a code
  const int64_t* starts;  // [K + 1], where a code's rows begin in `order`
  int64_t width;
  float* sums;  // [K, D]
};

struct QuantizeTable {
  // half[k] = |c_k|^2 / 2; gives the norm of the longest code.
  double (*half_norms)(const float* codes, int64_t count, int64_t width, float* half);
  // Brings rows [N, D] to float32, contiguous.
  void (*widen)(const Operand& x, int64_t rows, int64_t width, float* out);
  // Tasks of kSearchRows rows each.
  void (*search)(const SearchArgs& args, int64_t begin, int64_t end);
  // A task is a code.
  void (*sum_rows)(const SumArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(QuantizeTable, quantize_table)

}  // namespace gm
