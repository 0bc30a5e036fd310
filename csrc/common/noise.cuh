// Noise inside GPU kernels: the bits of common/math.h and philox.h, a counter at a time.
#pragma once

#include "common/math.h"
#include "common/philox.h"

namespace gm {
namespace device {

// The key of a call: from the device where key_ptr is not null.
static __device__ __forceinline__ NoiseKey read_key(NoiseKey key, const int64_t* key_ptr) {
  if (key_ptr) {
    key.seed = (uint64_t)key_ptr[0];
    key.offset = (uint64_t)key_ptr[1];
  }
  return key;
}

// The words of counters d4, d4 + 1, ... of a row: positions 4 d4 to 4 d4 + N - 1.
template <int N>
static __device__ __forceinline__ void noise_words(const NoiseKey& key, int64_t row, uint32_t d4,
                                                   uint32_t (&words)[N]) {
  static_assert(N % 4 == 0, "whole counters");
  const uint64_t r = key.offset + (uint64_t)row;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    uint32_t c0 = d4 + i / 4, c1 = (uint32_t)r, c2 = (uint32_t)(r >> 32), c3 = key.stream;
    philox4x32_10(c0, c1, c2, c3, (uint32_t)key.seed, (uint32_t)(key.seed >> 32));
    words[i] = c0, words[i + 1] = c1, words[i + 2] = c2, words[i + 3] = c3;
  }
}

// Standard normals there.
template <int N>
static __device__ __forceinline__ void normals(const NoiseKey& key, int64_t row, uint32_t d4,
                                               float (&x)[N]) {
  uint32_t words[N];
  noise_words(key, row, d4, words);
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    normal_pair(words[i], words[i + 1], x[i], x[i + 1]);
  }
}

// Uniforms in (0, 1] there.
template <int N>
static __device__ __forceinline__ void uniforms(const NoiseKey& key, int64_t row, uint32_t d4,
                                                float (&x)[N]) {
  uint32_t words[N];
  noise_words(key, row, d4, words);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = uniform_from((float)words[i]);
}

}  // namespace device
}  // namespace gm
