#include <cassert>

#include "common/slots.cuh"
#include "spline/spline.h"

namespace gm {
namespace device {

constexpr unsigned kAllLanes = 0xffffffffu;
// Blocks that a multiprocessor must hold: as many as go without spills.
constexpr int kForwardBlocks = 3, kBackwardBlocks = 2;
constexpr int kTileBytes = 48 << 10;  // of the shared memory of a block: what every GPU gives

// Parameters of an element in shared memory, at an odd distance from the next element's: lanes that
// read the same parameter of their elements then meet no bank twice.
GM_HD constexpr int pitch_of(int bins) { return (3 * bins - 1) | 1; }

// The elements that a warp takes at a time: `count` neighbouring slots of each of `rows` rows, row
// by row, and all their parameters.
struct Tile {
  float* values;
  int64_t row, slot;  // the first
  int rows, count;

  // body(span, tensor, at) for the parameters that are adjacent in one of the tensors `like`, from
  // value `at` on.
  template <class Like, class Body>
  __device__ __forceinline__ void for_spans(const SplineArgs& a, int bins, const Like (&like)[3],
                                            Body body) const {
#pragma unroll 1
    for (int j = 0; j < (a.joint ? 1 : 3); ++j) {
      if (!like[j].data) continue;
      const int n = a.joint ? 3 * bins - 1 : bins - (j == 2), gap = pitch_of(bins) - n;
      const bool dense = rows == 1 || like[j].row_stride == count * n;
      const int elements = dense ? rows * count : count;
      Span s{values + j * bins, elements * n, gap, gap ? 0xffffffffu / (uint32_t)n + 1 : 0};
      int64_t at = row * like[j].row_stride + slot * n;
#pragma unroll 1
      for (int r = 0; r < (dense ? 1 : rows); ++r, at += like[j].row_stride) {
        body(s, like[j], at);
        s.tile += count * pitch_of(bins);
      }
    }
  }

  __device__ __forceinline__ void load(const SplineArgs& a, int bins) const {
    for_spans(a, bins, a.raw, [](const Span& s, const Operand& raw, int64_t at) {
      if (raw.dtype == DType::f32) return load_span(s, (const float*)raw.data + at);
      if (raw.dtype == DType::f16) return load_span(s, (const __half*)raw.data + at);
      load_span(s, (const __nv_bfloat16*)raw.data + at);
    });
  }

  __device__ __forceinline__ void store(const SplineArgs& a, int bins) const {
    for_spans(a, bins, a.draw, [](const Span& s, const Result& draw, int64_t at) {
      if (draw.dtype == DType::f32) return store_span(s, (float*)draw.data + at);
      if (draw.dtype == DType::f16) return store_span(s, (__half*)draw.data + at);
      store_span(s, (__nv_bfloat16*)draw.data + at);
    });
  }
};

using One = Batch<false, 1, 1>;

// Runs body(batch, read(batch), parameters) over this lane's elements of a chunk, the parameters in
// shared memory, and finish(tile) after the elements of each tile. All lanes of a warp call this
// together, also those whose row does not exist.
template <class Read, class Body, class Finish>
static __device__ __forceinline__ void for_tiles(const SplineArgs& a, int bins, const RowGrid& grid,
                                                 const ChunkSlots& slots, int64_t row, int lane,
                                                 Read read, Body body, Finish finish) {
  extern __shared__ __align__(16) float shared_tiles[];
  const int lanes = 1 << grid.log2_lanes, width = min(lanes, 32), own_slot = lane % width;
  const int end = __shfl_sync(kAllLanes, slots.middle, 0);  // 0 where no row of the warp exists
#pragma unroll 1
  for (int first = lane - own_slot; first < end; first += lanes) {
    Tile tile;
    tile.values = shared_tiles + threadIdx.x / 32 * 32 * pitch_of(bins);
    tile.row = __shfl_sync(kAllLanes, row, 0);
    tile.slot = slots.start + first;
    tile.rows = (int)min((int64_t)(32 / width), grid.rows - tile.row);
    tile.count = min(width, end - first);
    tile.load(a, bins);
    const bool exists = row >= 0 && own_slot < tile.count;
    One batch;
    decltype(read(batch)) values;
    if (exists) {
      batch = slots.locate<One>(first + own_slot, 0);
      values = read(batch);
    }
    wait_for_spans();
    if (exists) {
      const int element = threadIdx.x % 32 / width * tile.count + own_slot;
      body(batch, values, tile.values + element * pitch_of(bins));
    }
    __syncwarp();
    finish(tile);
  }
}

// exp(raw - top) for raw <= top, to |raw - top| 2^-23 and 2 ulp (PTX ISA, ex2.approx); 0 below
// 2^-126.
static __device__ __forceinline__ float exponential(float raw, float top) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"((raw - top) * 1.44269504088896341f));
  return y;
}

// Of a call, widths first.
struct Axes {
  Axis axis[2];
};

struct Found {
  Bin<float> bin;
  float sigmoid[2];  // derivatives of the slopes at its ends
  int number;        // k
  float top[2];      // of the raw widths, and heights
  float sum[2];      // of all their exponentials
  float over[2];     // 1 / sum
  float before[2];   // of those of the bins before
  float chosen[2];   // that of this bin
};

// The bin that holds `at`; p: the element's parameters.
template <int kBins, bool kInverse>
static __device__ __forceinline__ Found find_bin(const SplineArgs& a, const Axes& axes,
                                                 const float* p, float at) {
  constexpr int kUnroll = kBins ? kBins : 4;
  const int bins = kBins ? kBins : a.bins;
  Found f;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float* raw = p + j * bins;
    f.top[j] = raw[0];
#pragma unroll kUnroll
    for (int k = 1; k < bins; ++k) f.top[j] = fmaxf(f.top[j], raw[k]);
    f.sum[j] = 0.0f;
#pragma unroll kUnroll
    for (int k = 0; k < bins; ++k) f.sum[j] += exponential(raw[k], f.top[j]);
    f.over[j] = 1.0f / f.sum[j];
    f.before[j] = 0.0f;
  }
  f.number = 0;
  // Edges for the search alone: the bin's own are computed more carefully below.
  constexpr int kAlong = kInverse ? 1 : 0;
  const Axis& along = axes.axis[kAlong];
  const float floor = 2.0f * a.bound * along.minimum;
  const float unit = 2.0f * a.bound * along.rest * f.over[kAlong];
  float sum[2] = {0.0f, 0.0f}, start = -a.bound;
#pragma unroll kUnroll
  for (int k = 1; k < bins; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) sum[j] += exponential(p[j * bins + k - 1], f.top[j]);
    start += floor;
    const bool above = at >= fma(unit, sum[kAlong], start);
#pragma unroll
    for (int j = 0; j < 2; ++j) f.before[j] = select(above, sum[j], f.before[j]);
    f.number += above;
  }
  const int k = f.number;
  const float raw0 = k > 0 ? p[2 * bins + k - 1] : a.end_derivative;
  const float raw1 = k + 1 < bins ? p[2 * bins + k] : a.end_derivative;
  Bin<float>& b = f.bin;
  b.d0 = softplus(raw0, f.sigmoid[0]) + a.min_derivative;
  b.d1 = softplus(raw1, f.sigmoid[1]) + a.min_derivative;
  float sizes[2], edges[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const Axis& axis = axes.axis[j];
    f.chosen[j] = exponential(p[j * bins + k], f.top[j]);
    sizes[j] = size_of(axis, f.chosen[j], f.sum[j], f.over[j], a.bound);
    edges[j][0] = edge_of(axis, (float)k, f.before[j], f.sum[j], f.over[j], bins, a.bound);
    const float before = f.before[j] + f.chosen[j];
    edges[j][1] = edge_of(axis, (float)(k + 1), before, f.sum[j], f.over[j], bins, a.bound);
  }
  b.w = sizes[0], b.left = edges[0][0], b.right = edges[0][1];
  b.h = sizes[1], b.low = edges[1][0], b.high = edges[1][1];
  return f;
}

// y and log_det of a row chunk, by the lanes of a RowGrid. kBins: the bins, or 0 for any number.
template <int kBins, bool kInverse>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) spline_forward_kernel(
    // x [B, D]; raw: [B, part, K], [B, part, K] and [B, part, K - 1], or adjacent in [B, part,
    // 3 K - 1]; from, to [units] or null, both; y [B, D]; partial [B, chunks], written where chunks
    // is over 1; log_det [B], written where it is 1. Any dtypes. Shared memory: a tile a warp.
    const __grid_constant__ SplineArgs a, const __grid_constant__ Axes axes,
    const __grid_constant__ RowGrid grid) {
  const int bins = kBins ? kBins : a.bins;
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    const ChunkSlots slots(a, chunk, columns);
    float sum = 0.0f;
    const auto read = [&](const One& batch) {
      return read_value(a.x, row * a.x.row_stride + batch.in[0]);
    };
    const auto map = [&](const One& batch, float at, const float* p) {
      const bool inside = at >= -a.bound && at <= a.bound;
      const float held = select(inside, at, 0.0f);
      const Found f = find_bin<kBins, kInverse>(a, axes, p, held);
      const Point<float> point = point_of<kInverse>(held, f.bin);
      const float y[1] = {select(inside, point.image, at)};
      write<One>(RowOut<Any>(a.y, row, 0), batch.out, y);
      sum += select(inside, log_slope(point), at != at ? at : 0.0f);
    };
    for_passed(slots, grid, lane, [&](const auto& batch) {
      pass<Any, std::decay_t<decltype(batch)>>(a.x, batch.in, a.y, batch.out, row);
    });
    for_tiles(a, bins, grid, slots, row, lane, read, map, [](const Tile&) {});
    sum = row_sum(sum, grid);
    if (lane != 0 || row < 0) return;
    if (grid.chunks > 1) {
      a.partial[row * grid.chunks + chunk] = sum;
    } else {
      a.log_det[row] = kInverse ? 0.0f - sum : sum;
    }
  });
}

// Gradient of raw sizes, in their place, from those of the bin's lower edge and size.
template <int kBins>
static __device__ __forceinline__ void softmax_gradient(float* raw, int bins, const Found& f, int j,
                                                        float scale, float dedge, float dsize) {
  const float edge = dedge * scale, size = dsize * scale;
  const float mean = (edge * f.before[j] + size * f.chosen[j]) * f.over[j];
#pragma unroll(kBins ? kBins : 4)
  for (int k = 0; k < bins; ++k) {
    const float c = f.number > k ? edge : f.number == k ? size : 0.0f;
    raw[k] = exponential(raw[k], f.top[j]) * f.over[j] * (c - mean);
  }
}

// Gradients of a row chunk, by the lanes of a RowGrid. kBins as in the forward kernel.
template <int kBins, bool kInverse>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) spline_backward_kernel(
    // x [B, D]; raw as in the forward kernel; from, to [units] or null, both; dy [B, D] or null;
    // dlog_det [B] or null; dx [B, D], draw like raw or null, each. Any dtypes. Shared memory: a
    // tile a warp.
    const __grid_constant__ SplineArgs a, const __grid_constant__ Axes axes,
    const __grid_constant__ RowGrid grid) {
  const int bins = kBins ? kBins : a.bins;
  const bool wants_raw = a.draw[0].data || a.draw[1].data || a.draw[2].data;
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    const ChunkSlots slots(a, chunk, columns);
    float l = 0.0f;
    if (columns && a.dlog_det.data) l = read_value(a.dlog_det, row * a.dlog_det.row_stride);
    const auto read = [&](const One& batch) {
      float2 values{read_value(a.x, row * a.x.row_stride + batch.in[0]), 0.0f};
      if (a.dy.data) values.y = read_value(a.dy, row * a.dy.row_stride + batch.out[0]);
      return values;
    };
    const auto differentiate = [&](const One& batch, float2 values, float* p) {
      const float at = values.x, g = values.y;
      const bool inside = at >= -a.bound && at <= a.bound;
      const float held = select(inside, at, 0.0f);
      const Found f = find_bin<kBins, kInverse>(a, axes, p, held);
      BinGradients<float> d = bin_gradients<kInverse>(point_of<kInverse>(held, f.bin), f.bin, g, l);
      if (a.dx.data) {
        const float dx[1] = {select(inside, d.dx, g)};
        write<One>(RowOut<Any>(a.dx, row, 0), batch.in, dx);
      }
      if (!wants_raw) return;
      const float nothing = at != at ? at : 0.0f;  // NaN stays, what is outside has no gradient
      for (float* part : {&d.dw, &d.dh, &d.dleft, &d.dlow, &d.dd0, &d.dd1})
        *part = select(inside, *part, nothing);
      const float scale = 2.0f * a.bound;
      softmax_gradient<kBins>(p, bins, f, 0, scale * axes.axis[0].rest, d.dleft, d.dw);
      softmax_gradient<kBins>(p + bins, bins, f, 1, scale * axes.axis[1].rest, d.dlow, d.dh);
      float* slopes = p + 2 * bins;
#pragma unroll(kBins ? kBins : 4)
      for (int k = 0; k + 1 < bins; ++k) slopes[k] = nothing;
      if (f.number > 0) slopes[f.number - 1] = d.dd0 * f.sigmoid[0];
      if (f.number + 1 < bins) slopes[f.number] = d.dd1 * f.sigmoid[1];
    };
    for_tiles(a, bins, grid, slots, row, lane, read, differentiate, [&](const Tile& tile) {
      if (!wants_raw) return;
      tile.store(a, bins);
      __syncwarp();
    });
    if (!a.dx.data) return;
    for_passed(slots, grid, lane, [&](const auto& batch) {
      pass<Any, std::decay_t<decltype(batch)>>(a.dy, batch.out, a.dx, batch.in, row);
    });
  });
}

// Shared memory of the tiles of a block, and its threads at most.
static int tile_bytes(int bins, int threads) { return threads * pitch_of(bins) * 4; }
static int threads_of(int bins) {
  return tile_bytes(bins, kThreads) <= kTileBytes ? kThreads : kThreads / 2;
}

// in, out: of the kernel's rows. A lane an element of a short row; of a longer one a warp, and then
// as many warps as give a lane 4 elements, a block at most. Follows from the shape, the split and
// the bins alone, as does the order of sums.
static RowGrid grid_of(const SplineArgs& a, const Place& in, const Place& out) {
  constexpr int N = kWidth<Any>;
  const bool grouped =
      a.columns % N == 0 && a.part % N == 0 && (a.from ? a.inner : a.begin) % N == 0;
  const bool vector = grouped && aligned(a.rows, N, {in, out});
  const int64_t part = a.part < kChunk ? a.part : kChunk;
  const int64_t columns = a.columns < kChunk ? a.columns : kChunk;
  RowGrid grid{a.rows, a.columns, chunks_of(a.columns), 0, vector};
  for (int lanes = 1; lanes < threads_of(a.bins); lanes *= 2, ++grid.log2_lanes) {
    if ((lanes >= 32 || lanes >= part) && lanes * 4 >= part && lanes * 32 >= columns) break;
  }
  return grid;
}

using Kernel = void (*)(SplineArgs, Axes, RowGrid);

// kernel(a, axes, grid) on the stream, a tile for each warp; nothing where there is nothing to do.
static void launch(const char* op, Kernel kernel, const SplineArgs& a, const RowGrid& grid,
                   void* stream) {
  if (grid.rows == 0) return;
  int device, processors;
  check_cuda(op, cudaGetDevice(&device));
  check_cuda(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int lanes = 1 << grid.log2_lanes, threads = lanes > 32 ? lanes : threads_of(a.bins);
  const int64_t rows_a_block = threads / lanes, most = (int64_t)processors * 64;
  const int64_t blocks = (grid.rows + rows_a_block - 1) / rows_a_block;
  const int64_t y = grid.chunks < 65535 ? grid.chunks : 65535;
  const int64_t x = blocks * y <= most ? blocks : most / y > 0 ? most / y : 1;
  const Axes axes{axis_of(a.bins, a.min_width), axis_of(a.bins, a.min_height)};
  const dim3 size((unsigned)x, (unsigned)y);
  kernel<<<size, threads, tile_bytes(a.bins, threads), (cudaStream_t)stream>>>(a, axes, grid);
  check_cuda(op, cudaGetLastError());
}

}  // namespace device

void spline_forward_cuda(const SplineArgs& a, void* stream) {
  using namespace device;
  const char* op = "spline_map";
  const RowGrid grid = grid_of(a, a.x, a.y);
  assert(grid.chunks == 1 || a.partial);
  const Kernel eight = a.inverse ? spline_forward_kernel<8, true> : spline_forward_kernel<8, false>;
  const Kernel any = a.inverse ? spline_forward_kernel<0, true> : spline_forward_kernel<0, false>;
  launch(op, a.bins == 8 ? eight : any, a, grid, stream);
  if (grid.chunks > 1) {
    sum_log_det(op, a.partial, a.log_det, a.inverse, a.rows, grid.chunks, stream);
  }
}

void spline_backward_cuda(const SplineArgs& a, void* stream) {
  using namespace device;
  const Kernel eight =
      a.inverse ? spline_backward_kernel<8, true> : spline_backward_kernel<8, false>;
  const Kernel any = a.inverse ? spline_backward_kernel<0, true> : spline_backward_kernel<0, false>;
  launch("spline_map_backward", a.bins == 8 ? eight : any, a, grid_of(a, a.dy, a.dx), stream);
}

}  // namespace gm
