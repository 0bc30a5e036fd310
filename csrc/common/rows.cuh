// How a grid shares [rows, columns] on the GPU, and how it is launched.
//
// A power of two of neighbouring threads (lanes) shares one chunk of one row: a few lanes where
// rows are short, a warp, a whole block; several blocks where a row has several chunks (rows.h).
// The cut depends on the columns and the dtype alone, so a row's sum does not depend on its
// neighbours.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/pack.cuh"
#include "common/rows.h"

namespace gm {
namespace device {

constexpr int kThreads = 256;  // threads of a block at most

struct RowGrid {
  int64_t rows, columns, chunks;
  int32_t log2_lanes;
  bool vector;  // whole groups may be accessed 16 bytes at a time
};

// Runs body(row, chunk, columns of the chunk, lane) over this thread's row chunks. All threads of a
// block make the same number of trips; where a row does not exist, its columns are 0 and its number
// is -1.
template <class Body>
static __device__ __forceinline__ void for_row_chunks(const RowGrid& grid, Body body) {
  const int lane = threadIdx.x & ((1 << grid.log2_lanes) - 1);
  const int64_t step = blockDim.x >> grid.log2_lanes;
  for (int64_t chunk = blockIdx.y; chunk < grid.chunks; chunk += gridDim.y) {
    const int64_t left = grid.columns - chunk * kChunk;
    const int columns = (int)(left < kChunk ? left : kChunk);
    for (int64_t first = blockIdx.x * step; first < grid.rows; first += gridDim.x * step) {
      const int64_t row = first + (threadIdx.x >> grid.log2_lanes);
      const bool exists = row < grid.rows;
      body(exists ? row : -1, chunk, exists ? columns : 0, lane);
    }
  }
}

// Runs body(vector, g, count) over this lane's groups of kGroup columns, g counting from the start
// of the chunk: whole groups first, as vectors where the grid says so, then the rest, of which
// `count` columns exist. Eight columns a trip, so that their loads are in flight together.
template <int kGroup, class Body>
static __device__ __forceinline__ void for_groups(const RowGrid& grid, int lane, int columns,
                                                  Body body) {
  const int lanes = 1 << grid.log2_lanes, whole = grid.vector ? columns / kGroup : 0;
  int g = lane;
#pragma unroll(8 / kGroup)
  for (; g < whole; g += lanes) body(std::true_type{}, g, kGroup);
#pragma unroll 1
  for (; g * kGroup < columns; g += lanes) {
    body(std::false_type{}, g, min(columns - g * kGroup, kGroup));
  }
}

// A tensor of the call, as its launcher sees it; absent where data is null.
struct Place {
  const void* data;
  int64_t row_stride;
  DType dtype;

  Place(const Operand& x) : data(x.data), row_stride(x.row_stride), dtype(x.dtype) {}
  Place(const Result& y) : data(y.data), row_stride(y.row_stride), dtype(y.dtype) {}
};

// Do groups of `width` columns start at multiples of their size in every row of every tensor?
inline bool aligned(int64_t rows, int width, std::initializer_list<Place> places) {
  for (const Place& x : places) {
    const uint64_t bytes = width * (x.dtype == DType::f32 ? 4 : 2);
    const uint64_t row_bytes = rows > 1 ? x.row_stride * (bytes / width) : 0;
    if (x.data && ((uint64_t)x.data % bytes || row_bytes % bytes)) return false;
  }
  return true;
}

// Lanes so that a thread has about 4 to 8 groups of a long row, and 8 lanes beside each other at
// least where there are so many groups: 128 bytes in a row.
inline RowGrid row_grid(int64_t rows, int64_t columns, int width, bool vector) {
  RowGrid grid{rows, columns, chunks_of(columns), 0, vector};
  const int64_t groups = ((columns < kChunk ? columns : kChunk) + width - 1) / width;
  const int64_t per_lane = groups <= 256 ? 4 : 8;
  while ((1 << grid.log2_lanes) < kThreads) {
    const int64_t lanes = 1 << grid.log2_lanes;
    if (lanes >= groups || (lanes >= 8 && lanes * per_lane >= groups)) break;
    ++grid.log2_lanes;
  }
  return grid;
}

// Calls body(T{}, grid) with T the dtype that all tensors share, or Any where they differ.
template <class Body>
void with_dtype(int64_t rows, int64_t columns, std::initializer_list<Place> places, Body body) {
  const DType dtype = places.begin()->dtype;
  bool same = true;
  for (const Place& x : places) same = same && (!x.data || x.dtype == dtype);
  const auto run = [&](auto type) {
    constexpr int width = kWidth<decltype(type)>;
    body(type, row_grid(rows, columns, width, aligned(rows, width, places)));
  };
  if (!same) return run(Any{});
  if (dtype == DType::f32) return run(float{});
  if (dtype == DType::bf16) return run(__nv_bfloat16{});
  run(__half{});
}

inline void check_cuda(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// kernel(args..., grid) on the stream; nothing where there is nothing to do.
template <class... Parameters, class... Args>
void launch_rows(const char* op, void (*kernel)(Parameters...), const RowGrid& grid, void* stream,
                 const Args&... args) {
  if (grid.rows == 0 || grid.chunks == 0) return;
  int device, processors;
  check_cuda(op, cudaGetDevice(&device));
  check_cuda(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int lanes = 1 << grid.log2_lanes, threads = lanes > 32 ? lanes : kThreads;
  const int64_t rows_a_block = threads / lanes,
                most = (int64_t)processors * 64 * (kThreads / threads);
  const int64_t tiles = (grid.rows + rows_a_block - 1) / rows_a_block;
  const int64_t y = grid.chunks < 65535 ? grid.chunks : 65535;
  const int64_t x = tiles * y <= most ? tiles : most / y > 0 ? most / y : 1;
  kernel<<<dim3((unsigned)x, (unsigned)y), threads, 0, (cudaStream_t)stream>>>(args..., grid);
  check_cuda(op, cudaGetLastError());
}

}  // namespace device
}  // namespace gm
