// How [rows, columns] work is cut into tasks. A task is one chunk of one row, so that one long row
// keeps all threads busy; the cut depends on the shape alone, so sums come out the same for any
// thread count.
#pragma once

#include <cstdint>

namespace gm {

constexpr int64_t kChunk = 8192;
constexpr int64_t kStreamBytes = 8 << 20;  // outputs from here on are written past the caches
constexpr int kBlock = 512;                // elements brought to float32 at a time; divides kChunk

inline int64_t chunks_of(int64_t columns) {
  return columns <= kChunk ? 1 : (columns + kChunk - 1) / kChunk;
}

}  // namespace gm
