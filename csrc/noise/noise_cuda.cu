#include "common/noise.cuh"
#include "common/rows.cuh"
#include "noise/noise.h"

namespace gm {
namespace device {

// A group of columns a step and thread: whole counters, one store of 16 bytes.
template <class T, Distribution kDistribution>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(const __grid_constant__ NoiseKey key,  // key_ptr replaces its seed and offset
                 const int64_t* key_ptr,                // [2] seed and offset, or null
                 const __grid_constant__ Result out,    // [rows, columns] of T
                 const __grid_constant__ RowGrid grid) {
  constexpr int kGroup = kWidth<T>;
  const NoiseKey k = read_key(key, key_ptr);
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    const int64_t start = chunk * kChunk;
    const RowOut<T> y(out, row, start);
    for_groups<kGroup>(grid, lane, columns, [&](auto vector, int g, int count) {
      float x[kGroup];
      const uint32_t d4 = (uint32_t)(start / 4) + g * (kGroup / 4);
      if constexpr (kDistribution == Distribution::normal) {
        normals(k, row, d4, x);
      } else {
        uniforms(k, row, d4, x);
      }
      y.template store<vector>(g, count, x);
    });
  });
}

}  // namespace device

void noise_fill_cuda(Distribution distribution, const NoiseKey& key, const int64_t* key_ptr,
                     const Result& out, int64_t rows, int64_t columns, void* stream) {
  const bool is_normal = distribution == Distribution::normal;
  device::with_dtype(rows, columns, {out}, [&](auto type, const device::RowGrid& grid) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, device::Any>) {
      device::launch_rows(is_normal ? "normal" : "uniform",
                          is_normal ? &device::noise_kernel<T, Distribution::normal>
                                    : &device::noise_kernel<T, Distribution::uniform>,
                          grid, stream, key, key_ptr, out);
    }
  });
}

}  // namespace gm
