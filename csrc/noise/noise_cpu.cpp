#include "common/block.h"
#include "noise/noise.h"

namespace gm {
namespace GM_ISA {

static void fill(Distribution distribution, const NoiseKey& key, const Result& out, int64_t columns,
                 int64_t begin, int64_t end) {
  for_chunks(columns, begin, end, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    Buffer noise;
    for_blocks(start, n, [&](int64_t at, int64_t count) {
      const bool is_normal = distribution == Distribution::normal;
      const Out open = open_block(out, row, at, noise);
      float* to = count == kBlock && !open.past ? open.data : noise.data;
      is_normal ? normals(key, row, at, count, to) : uniforms(key, row, at, count, to);
      if (to != open.data) {
        for_vectors(count, [&](auto lane, int64_t i) {
          using F = decltype(lane);
          put<F>(open, i, load<F>(noise.data + i));
        });
      }
      close_block(out, row, at, count, noise);
    });
  });
}

static void host_exp(const float* x, float* y, int64_t n) {
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    store<F>(y + i, exp(load<F>(x + i)));
  });
}

static void host_log(const float* x, float* y, int64_t n) {
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    store<F>(y + i, log(load<F>(x + i)));
  });
}

static void host_log1p_unit(const float* x, float* y, int64_t n) {
  for_vectors(n, [&](auto lane, int64_t i) {
    using F = decltype(lane);
    store<F>(y + i, log1p_unit(load<F>(x + i)));
  });
}

static void host_sincospi(const float* x, float* sine, float* cosine, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    sincos_turns((uint32_t)(uint64_t)((double)x[i] * 0x1p31), sine[i], cosine[i]);
}

static void host_normal_from_words(const uint32_t* words, float* y, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    normal_pair(words[2 * i], words[2 * i + 1], y[2 * i], y[2 * i + 1]);
  }
}

extern const NoiseTable noise_table = {
    fill, {host_exp, host_log, host_log1p_unit, host_sincospi, host_normal_from_words}};

}  // namespace GM_ISA
}  // namespace gm
