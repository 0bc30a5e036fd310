#include "activation/activation.h"
#include "common/block.h"

namespace gm {
namespace GM_ISA {

static void gelu_tasks(const GeluArgs& a, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer buffers[2];
      const float* x = load_block(a.x, row, at, count, buffers[0]);
      const Out y = open_block(a.y, row, at, buffers[1]);
      for_vectors(count, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        put<F>(y, i, gelu(load<F>(x + i)));
      });
      close_block(a.y, row, at, count, buffers[1]);
    });
  });
}

static void gelu_backward_tasks(const GeluArgs& a, int64_t begin, int64_t end) {
  for_chunks(a.columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      Buffer buffers[3];
      const float* x = load_block(a.x, row, at, count, buffers[0]);
      const float* g = load_block(a.dy, row, at, count, buffers[1]);
      const Out dx = open_block(a.dx, row, at, buffers[2]);
      for_vectors(count, [&](auto lane, int64_t i) {
        using F = decltype(lane);
        put<F>(dx, i, load<F>(g + i) * gelu_gradient(load<F>(x + i)));
      });
      close_block(a.dx, row, at, count, buffers[2]);
    });
  });
}

extern const ActivationTable activation_table = {gelu_tasks, gelu_backward_tasks};

}  // namespace GM_ISA
}  // namespace gm
