// Asking memory for later rows while one is computed. Hardware prefetchers stop at the end of a
// page and start anew after misses in the next one.
#pragma once

#include "common/block.h"

namespace gm {
namespace GM_ISA {

// How many rows ahead of the one in work memory is asked for its lines; 0: not at all. far: the
// call reads more than the caches hold.
static inline int64_t rows_ahead(bool far, int64_t columns) {
  constexpr int64_t kElements = 4096;  // no nearer: hardware looks as far itself
  if (!far || columns > kChunk) return 0;
  return columns < kElements ? kElements / columns : 1;
}

// The lines of a later row; at: where position 0 of a block is.
struct Ahead {
  const char* line;
  int64_t size;  // bytes an element
  Ahead(const Operand& x, int64_t row, int64_t at) : size(x.dtype == DType::f32 ? 4 : 2) {
    line = (const char*)x.data + (row * x.row_stride + at) * size;
  }
  // Inlined always: GCC drops calls of a function that does nothing but prefetch.
  [[gnu::always_inline]] void ask(int64_t i) const { __builtin_prefetch(line + i * size, 0, 2); }
};

// As for_vectors(); where rows are looked ahead, each of `later` is asked for what stands at i.
template <class Body, class... Later>
[[gnu::always_inline]] static inline void for_vectors_ahead(int64_t rows, int64_t n, Body body,
                                                            const Later&... later) {
  if (!rows) return for_vectors(n, body);
  for_vectors(n, [&](auto lane, int64_t i) __attribute__((always_inline)) {
    (later.ask(i), ...);
    body(lane, i);
  });
}

}  // namespace GM_ISA
}  // namespace gm
