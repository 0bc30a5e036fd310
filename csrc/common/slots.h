// How a split divides a row (see gmkernels/split.py). A row is seen as slots: the transformed
// elements 0 .. part - 1 in the order of the parameters, then those that pass.
#pragma once

#include <cstdint>

namespace gm {

struct Slots {
  const int32_t* from = nullptr;  // [units] unit of slot unit k in the input; null: one run
  const int32_t* to = nullptr;    // [units] the same in the output
  int64_t units = 0;              // columns / inner
  int64_t inner = 1;              // adjacent elements a unit
  int64_t begin = 0;              // without from: the transformed part is [begin, begin + part)
  int64_t part = 0;
};

}  // namespace gm
