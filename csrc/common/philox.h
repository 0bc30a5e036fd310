// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
// Templates over the word type: uint32_t on the host's scalar path and on the GPU, vu64 in CPU
// vectors.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#if !defined(__CUDACC__)
#include "common/simd.h"
#endif

namespace gm {
namespace GM_ISA {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;

GM_HD void mulhilo(uint32_t a, uint32_t m, uint32_t& hi, uint32_t& lo) {
#if defined(__CUDA_ARCH__)
  hi = __umulhi(a, m);
  lo = a * m;
#else
  const uint64_t product = (uint64_t)a * m;
  hi = (uint32_t)(product >> 32);
  lo = (uint32_t)product;
#endif
}

// c: the counter on entry, the four random words on return.
template <class U>
GM_HD void philox4x32_10(U& c0, U& c1, U& c2, U& c3, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    U hi0, lo0, hi1, lo1;
    mulhilo(c0, kPhiloxM0, hi0, lo0);
    mulhilo(c2, kPhiloxM1, hi1, lo1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// The key of a row: the call's, folded by an index as noise.fold_in does.
GM_HD NoiseKey fold_key(NoiseKey key, int64_t index) {
  uint32_t c0 = (uint32_t)index, c1 = (uint32_t)((uint64_t)index >> 32), c2 = 0, c3 = 0xffffffffu;
  philox4x32_10(c0, c1, c2, c3, (uint32_t)key.seed, (uint32_t)(key.seed >> 32));
  key.seed = (uint64_t)c0 | (uint64_t)c1 << 32;
  return key;
}

}  // namespace GM_ISA
}  // namespace gm
