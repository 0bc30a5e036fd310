// Heads of queries, keys and values as attention reads them.
#pragma once

#include "common/dtype.h"

namespace gm {

constexpr float kHidden = -1e30f;  // stands for a score of -inf, so that differences stay finite
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// [B, H, T, D] at any strides, in elements, but contiguous along D. data is null where absent.
struct Heads {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  DType dtype = DType::f32;
};

// D padded to whole vectors of every object.
inline int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace gm
