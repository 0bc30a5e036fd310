// How a CUDA kernel finds a chunk's slots (slots.h) in a row, reads and writes them, copies what
// passes, brings parameters to shared memory, and adds up the log-determinants of a row's chunks.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "common/reduce.cuh"
#include "common/slots.h"

namespace gm {
namespace device {

// Slots that a lane takes at a time: kRuns runs of kRunWidth neighbours. vector: a run is one
// access.
template <bool kVector, int kRunWidth, int kRuns>
struct Batch {
  static constexpr bool vector = kVector;
  static constexpr int width = kRunWidth, runs = kRuns, size = kRuns * kRunWidth;
  int slot[kRuns];                // number of each run in the chunk: it starts at slot * width
  int64_t in[kRuns], out[kRuns];  // where the runs start in the row that comes in, and goes out
};

// The slots of a chunk.
struct ChunkSlots {
  const Slots& a;
  int columns;            // slots of the chunk
  int middle;             // those from here on pass
  int turn;               // without a table: and lie behind the transformed part from here on
  int64_t start;          // the first slot
  int64_t unit = 0;       // with a table: its unit
  int64_t past = 0;       // and how far from the start of that unit it is
  int lead = 0;           // slots of the chunk in that unit
  uint32_t by_inner = 0;  // 2^31 / inner, rounded up
  uint32_t last_unit = 0;

  __device__ __forceinline__ ChunkSlots(const Slots& a, int64_t chunk, int columns)
      : a(a), columns(columns), start(chunk * kChunk) {
    middle = offset_of(a.part);
    turn = offset_of(a.part + a.begin);
    if (!a.from) return;
    if (start) unit = start / a.inner, past = start % a.inner;
    lead = (int)min(a.inner - past, kChunk);
    const uint32_t inner = (uint32_t)min(a.inner, kChunk);
    by_inner = (0x7fffffffu + inner) / inner;
    last_unit = (uint32_t)min(a.units - 1, (int64_t)INT32_MAX);
  }

  // Where a slot comes in this chunk; its start or end where it comes before or after it.
  __device__ __forceinline__ int offset_of(int64_t slot) const {
    return (int)max(min(slot - start, (int64_t)columns), (int64_t)0);
  }

  // A unit of the row, whatever the table holds.
  __device__ __forceinline__ int64_t read_unit(const int32_t* table, int64_t k) const {
    return min((uint32_t)table[k], last_unit);
  }

  // The batch of the runs at, at + step, ...
  template <class B>
  __device__ __forceinline__ B locate(int at, int step) const {
    B batch;
#pragma unroll
    for (int i = 0; i < B::runs; ++i) batch.slot[i] = at + i * step;
    if (!a.from) {
#pragma unroll
      for (int i = 0; i < B::runs; ++i) {
        const int slot = batch.slot[i] * B::width;
        const int64_t by = slot < middle ? a.begin : slot < turn ? -a.part : 0;
        batch.in[i] = batch.out[i] = start + by + slot;
      }
    } else if (a.inner == 1) {
#pragma unroll
      for (int i = 0; i < B::runs; ++i) {
        batch.in[i] = read_unit(a.from + start, batch.slot[i]);
        batch.out[i] = read_unit(a.to + start, batch.slot[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < B::runs; ++i) {
        // Units after the first. Below kChunk the product has the quotient's whole part.
        const int slot = batch.slot[i] * B::width;
        const uint32_t k = slot < lead ? 0 : 1 + __umulhi(2 * (uint32_t)(slot - lead), by_inner);
        const int64_t within = past + slot - k * a.inner;
        batch.in[i] = read_unit(a.from + unit, k) * a.inner + within;
        batch.out[i] = read_unit(a.to + unit, k) * a.inner + within;
      }
    }
    return batch;
  }
};

// Runs body(batch) over this lane's runs, from number `at` on, as far as they fill whole batches
// that end at the slot `end` of the chunk at the latest, and moves `at`.
template <class B, class Body>
static __device__ __forceinline__ void for_batches(const ChunkSlots& slots, int lanes, int& at,
                                                   int end, Body body) {
#pragma unroll 1
  for (; at + (B::runs - 1) * lanes < end / B::width; at += B::runs * lanes) {
    body(slots.locate<B>(at, lanes));
  }
}

template <class T>
static __device__ __forceinline__ T moved(T row, int64_t by) {
  if constexpr (std::is_same_v<T, RowIn<Any>> || std::is_same_v<T, RowOut<Any>>) {
    row.at += by;
  } else {
    row.row += by;
  }
  return row;
}

// The values of a batch: of runs by their number in a chunk, or by their places in a row.
template <class B, class Row, class I>
static __device__ __forceinline__ void read(const Row& row, const I (&at)[B::runs],
                                            float (&values)[B::size]) {
#pragma unroll
  for (int k = 0; k < B::runs; ++k) {
    float run[B::width];
    if constexpr (std::is_same_v<I, int>) {
      row.template load<B::vector>(at[k], B::width, run);
    } else {
      moved(row, at[k]).template load<B::vector>(0, B::width, run);
    }
#pragma unroll
    for (int i = 0; i < B::width; ++i) values[k * B::width + i] = run[i];
  }
}
template <class B, class Row, class I>
static __device__ __forceinline__ void write(const Row& row, const I (&at)[B::runs],
                                             const float (&values)[B::size]) {
#pragma unroll
  for (int k = 0; k < B::runs; ++k) {
    float run[B::width];
#pragma unroll
    for (int i = 0; i < B::width; ++i) run[i] = values[k * B::width + i];
    if constexpr (std::is_same_v<I, int>) {
      row.template store<B::vector>(at[k], B::width, run);
    } else {
      moved(row, at[k]).template store<B::vector>(0, B::width, run);
    }
  }
}

template <class B, class Word>
static __device__ __forceinline__ void copy_bits(const Word* x, const int64_t (&x_at)[B::runs],
                                                 Word* y, const int64_t (&y_at)[B::runs]) {
  struct alignas(B::vector ? B::width * sizeof(Word) : sizeof(Word)) Run {
    Word words[B::width];
  };
  Run runs[B::runs];
#pragma unroll
  for (int k = 0; k < B::runs; ++k) runs[k] = *(const Run*)(x + x_at[k]);
#pragma unroll
  for (int k = 0; k < B::runs; ++k) *(Run*)(y + y_at[k]) = runs[k];
}

// A batch that passes: its bits, unless x is absent or of another dtype than y.
template <class T, class B>
static __device__ __forceinline__ void pass(const Operand& x, const int64_t (&x_at)[B::runs],
                                            const Result& y, const int64_t (&y_at)[B::runs],
                                            int64_t row) {
  constexpr bool kAny = std::is_same_v<T, Any>;
  const int64_t from = row * x.row_stride, to = row * y.row_stride;
  if (x.data && (!kAny || x.dtype == y.dtype)) {
    if (std::is_same_v<T, float> || (kAny && x.dtype == DType::f32)) {
      return copy_bits<B>((const uint32_t*)x.data + from, x_at, (uint32_t*)y.data + to, y_at);
    }
    return copy_bits<B>((const uint16_t*)x.data + from, x_at, (uint16_t*)y.data + to, y_at);
  }
  float values[B::size] = {};
  if (x.data) read<B>(RowIn<T>(x, row, 0), x_at, values);
  write<B>(RowOut<T>(y, row, 0), y_at, values);
}

// Runs passed(batch) over this lane's slots of a chunk that pass.
template <class Passed>
static __device__ __forceinline__ void for_passed(const ChunkSlots& slots, const RowGrid& grid,
                                                  int lane, Passed passed) {
  constexpr int N = kWidth<Any>;
  const int lanes = 1 << grid.log2_lanes;
  if (grid.vector) {
    int at = slots.middle / N + lane;
    return for_batches<Batch<true, N, 1>>(slots, lanes, at, slots.columns, passed);
  }
  int at = slots.middle + lane;
  for_batches<Batch<false, 1, 4>>(slots, lanes, at, slots.columns, passed);
  for_batches<Batch<false, 1, 1>>(slots, lanes, at, slots.columns, passed);
}

// What slots have several values of comes through shared memory, where a warp holds a tile of it.
// A span is adjacent in memory, n values of each slot; in the tile every slot starts `gap` behind
// the end of the one before.
struct Span {
  float* tile;
  int total, gap;
  uint32_t by_n;  // 2^32 / n, rounded up; 0 without a gap

  // The quotient is exact, since total n is below 2^32.
  __device__ __forceinline__ float& at(int i) const { return tile[i + __umulhi(i, by_n) * gap]; }
  // Values to move 16 bytes of memory at a time, from the first on.
  template <class T>
  __device__ __forceinline__ int in_vectors(const T* p) const {
    constexpr int N = kWidth<T>;
    return gap || ((uint64_t)p | (uint64_t)tile) % 16 ? 0 : total / N * N;
  }
};

// A span from memory by the lanes of a warp, which access neighbours. Complete after
// wait_for_spans(): float32 goes past the registers, so that a whole tile is in flight.
static __device__ __forceinline__ void load_span(const Span& s, const float* p) {
  const int lane = threadIdx.x % 32, middle = s.in_vectors(p);
#pragma unroll 2
  for (int i = lane * 4; i < middle; i += 128) __pipeline_memcpy_async(s.tile + i, p + i, 16);
#pragma unroll 2
  for (int i = middle + lane; i < s.total; i += 32) __pipeline_memcpy_async(&s.at(i), p + i, 4);
}
// Several accesses a trip, so that they are in flight together.
template <class H>
static __device__ __forceinline__ void load_span(const Span& s, const H* p) {
  constexpr int kTrip = 2, N = kWidth<H>;
  const int lane = threadIdx.x % 32, middle = s.in_vectors(p);
#pragma unroll 1
  for (int i = lane * N; i < middle; i += 32 * N * kTrip) {
    uint4 words[kTrip];
#pragma unroll
    for (int k = 0; k < kTrip; ++k)
      if (i + 32 * N * k < middle) words[k] = *(const uint4*)(p + i + 32 * N * k);
#pragma unroll
    for (int k = 0; k < kTrip; ++k) {
      if (i + 32 * N * k >= middle) break;
      float4* const to = (float4*)(s.tile + i + 32 * N * k);
      float x[N];
      load_vector((const H*)&words[k], 0, x);
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
  }
#pragma unroll 1
  for (int i = middle + lane; i < s.total; i += 32 * kTrip) {
    H values[kTrip];
#pragma unroll
    for (int k = 0; k < kTrip; ++k)
      if (i + 32 * k < s.total) values[k] = p[i + 32 * k];
#pragma unroll
    for (int k = 0; k < kTrip; ++k)
      if (i + 32 * k < s.total) s.at(i + 32 * k) = widen(values[k]);
  }
}
static __device__ __forceinline__ void wait_for_spans() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncwarp();
}

template <class T>
static __device__ __forceinline__ void store_span(const Span& s, T* p) {
  constexpr int N = kWidth<T>;
  const int lane = threadIdx.x % 32, middle = s.in_vectors(p);
#pragma unroll 2
  for (int i = lane * N; i < middle; i += 32 * N) {
    float x[N];
#pragma unroll
    for (int c = 0; c < N; ++c) x[c] = s.tile[i + c];
    store_vector(p + i, 0, x);
  }
#pragma unroll 2
  for (int i = middle + lane; i < s.total; i += 32) narrow(s.at(i), p[i]);
}

// log_det of rows that have several chunks: a warp a row, in a fixed order.
static __global__ void __launch_bounds__(kThreads) log_det_sum_kernel(
    // partial [B, chunks]; log_det [B], of the inverse map if inverse. The grid's columns are the
    // chunks.
    const float* partial, float* log_det, bool inverse, const __grid_constant__ RowGrid grid) {
  for_row_chunks(grid, [&](int64_t row, int64_t, int columns, int lane) {
    double sum = 0.0;
    if (columns) {
      for (int64_t i = lane; i < grid.columns; i += 32) sum += partial[row * grid.columns + i];
    }
    sum = row_sum(sum, grid);
    if (lane == 0 && row >= 0) log_det[row] = (float)(inverse ? 0.0 - sum : sum);
  });
}

inline void sum_log_det(const char* op, const float* partial, float* log_det, bool inverse,
                        int64_t rows, int64_t chunks, void* stream) {
  const RowGrid warps{rows, chunks, 1, 5, false};
  launch_rows(op, &log_det_sum_kernel, warps, stream, partial, log_det, inverse);
}

}  // namespace device
}  // namespace gm
