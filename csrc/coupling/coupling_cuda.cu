#include <cassert>

#include "common/slots.cuh"
#include "coupling/coupling.h"

namespace gm {
namespace device {

// Blocks that a multiprocessor must hold: as many as go without spills.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;

// Runs transformed(batch) and passed(batch) over this lane's slots of a chunk. kGrouped: in runs of
// several neighbours. Else neighbouring lanes take neighbouring slots, each lane four at a time, so
// that a warp's accesses stay close where a table scatters them.
template <class T, bool kGrouped, class Transformed, class Passed>
static __device__ __forceinline__ void for_slots(const ChunkSlots& slots, const RowGrid& grid,
                                                 int lane, Transformed transformed, Passed passed) {
  const int lanes = 1 << grid.log2_lanes;
  int at = lane;
  const auto run = [&](auto batch, int end, auto body) {
    for_batches<decltype(batch)>(slots, lanes, at, end, body);
  };
  if constexpr (!kGrouped) {
    run(Batch<false, 1, 4>{}, slots.middle, transformed);
    run(Batch<false, 1, 1>{}, slots.middle, transformed);
    run(Batch<false, 1, 4>{}, slots.columns, passed);
    run(Batch<false, 1, 1>{}, slots.columns, passed);
  } else if (grid.vector) {
    run(Batch<true, kWidth<T>, 1>{}, slots.middle, transformed);
    run(Batch<true, kWidth<T>, 1>{}, slots.columns, passed);
  } else {
    run(Batch<false, kWidth<T>, 1>{}, slots.middle, transformed);
    run(Batch<false, kWidth<T>, 1>{}, slots.columns, passed);
  }
}

// y and log_det of a row chunk, by the lanes of a RowGrid.
template <class T, bool kGrouped, Scale kScale, bool kInverse>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) coupling_forward_kernel(
    // x [B, D]; shift [B, part]; raw [B, part] unless additive; from, to [units] or null, both; y
    // [B, D]; partial [B, chunks], written where chunks is over 1; log_det [B], written where it is
    // 1. T is the dtype of x, shift, raw and y.
    const __grid_constant__ CouplingArgs a, const __grid_constant__ RowGrid grid) {
  const float inverse_clamp = 1.0f / a.clamp;
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    const ChunkSlots slots(a, chunk, columns);
    const RowIn<T> x(a.x, row, 0), shift(a.shift, row, slots.start), raw(a.raw, row, slots.start);
    const RowOut<T> y(a.y, row, 0);
    float sum = 0.0f;
    const auto transformed = [&](const auto& batch) {
      using B = std::decay_t<decltype(batch)>;
      float v[B::size], t[B::size], u[B::size] = {}, log_s[B::size];
      read<B>(x, batch.in, v);
      read<B>(shift, batch.slot, t);
      if constexpr (kScale != Scale::additive) read<B>(raw, batch.slot, u);
#pragma unroll
      for (int i = 0; i < B::size; ++i) {
        const auto scale = scaling<kScale, kInverse>(u[i], a.clamp, inverse_clamp);
        log_s[i] = scale.log_s;
        v[i] = mapped<kInverse>(v[i], t[i], scale.s);
      }
      sum += group_sum(log_s);
      write<B>(y, batch.out, v);
    };
    const auto passed = [&](const auto& batch) {
      pass<T, std::decay_t<decltype(batch)>>(a.x, batch.in, a.y, batch.out, row);
    };
    for_slots<T, kGrouped>(slots, grid, lane, transformed, passed);
    sum = row_sum(sum, grid);
    if (lane != 0 || row < 0) return;
    if (grid.chunks > 1) {
      a.partial[row * grid.chunks + chunk] = sum;
    } else {
      a.log_det[row] = kInverse ? 0.0f - sum : sum;
    }
  });
}

// Gradients of a row chunk, by the lanes of a RowGrid.
template <class T, bool kGrouped, Scale kScale, bool kInverse>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) coupling_backward_kernel(
    // x [B, D], raw [B, part], read unless additive; shift [B, part], read by the inverse unless
    // additive; from, to [units] or null, both; dy [B, D] or null; dlog_det [B] or null, any dtype;
    // dx [B, D], dshift, draw [B, part] or null, each. T is the dtype of all but dlog_det.
    const __grid_constant__ CouplingArgs a, const __grid_constant__ RowGrid grid) {
  const float inverse_clamp = 1.0f / a.clamp;
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    if (!columns) return;
    float l = 0.0f;
    if (a.dlog_det.data) l = read_value(a.dlog_det, row * a.dlog_det.row_stride);
    const ChunkSlots slots(a, chunk, columns);
    const RowIn<T> x(a.x, row, 0), shift(a.shift, row, slots.start), raw(a.raw, row, slots.start);
    const RowIn<T> dy(a.dy, row, 0);
    const RowOut<T> dx(a.dx, row, 0), dshift(a.dshift, row, slots.start);
    const RowOut<T> draw(a.draw, row, slots.start);
    const auto transformed = [&](const auto& batch) {
      using B = std::decay_t<decltype(batch)>;
      float v[B::size] = {}, t[B::size] = {}, u[B::size] = {}, d[B::size] = {};
      if constexpr (kScale != Scale::additive) {
        read<B>(x, batch.in, v);
        if constexpr (kInverse) read<B>(shift, batch.slot, t);
        read<B>(raw, batch.slot, u);
      }
      if (a.dy.data) read<B>(dy, batch.out, d);
#pragma unroll
      for (int i = 0; i < B::size; ++i) {
        const auto g =
            coupling_gradients<kScale, kInverse>(v[i], t[i], u[i], d[i], l, a.clamp, inverse_clamp);
        v[i] = g.dx, t[i] = g.dshift, u[i] = g.draw;
      }
      if (a.dx.data) write<B>(dx, batch.in, v);
      if (a.dshift.data) write<B>(dshift, batch.slot, t);
      if (kScale != Scale::additive && a.draw.data) write<B>(draw, batch.slot, u);
    };
    const auto passed = [&](const auto& batch) {
      using B = std::decay_t<decltype(batch)>;
      if (a.dx.data) pass<T, B>(a.dy, batch.out, a.dx, batch.in, row);
    };
    for_slots<T, kGrouped>(slots, grid, lane, transformed, passed);
  });
}

// Calls body(T{}, grouped, scale, inverse, grid), all but the grid as constants. Whether slots are
// grouped follows from the shape and the split alone, as does the order of sums.
template <class Body>
static void with_kernel(const CouplingArgs& a, std::initializer_list<Place> places, Body body) {
  with_dtype(a.rows, a.columns, places, [&](auto type, const RowGrid& grid) {
    constexpr int N = kWidth<decltype(type)>;
    const auto access = [&](auto scale, auto inverse) {
      if (a.columns % N == 0 && a.part % N == 0 && (a.from ? a.inner : a.begin) % N == 0) {
        return body(type, std::true_type{}, scale, inverse, grid);
      }
      body(type, std::false_type{}, scale, inverse, row_grid(a.rows, a.columns, 1, false));
    };
    const auto direction = [&](auto scale) {
      a.inverse ? access(scale, std::true_type{}) : access(scale, std::false_type{});
    };
    switch (a.scale) {
      case Scale::additive:
        return direction(std::integral_constant<Scale, Scale::additive>{});
      case Scale::exp:
        return direction(std::integral_constant<Scale, Scale::exp>{});
      case Scale::tanh:
        return direction(std::integral_constant<Scale, Scale::tanh>{});
      case Scale::sigmoid:
        return direction(std::integral_constant<Scale, Scale::sigmoid>{});
    }
  });
}

}  // namespace device

void coupling_forward_cuda(const CouplingArgs& a, void* stream) {
  const char* op = "affine_coupling";
  device::with_kernel(
      a, {a.x, a.shift, a.raw, a.y},
      [&](auto type, auto grouped, auto scale, auto inverse, const device::RowGrid& grid) {
        using T = decltype(type);
        assert(grid.chunks == 1 || a.partial);
        device::launch_rows(op, &device::coupling_forward_kernel<T, grouped, scale, inverse>, grid,
                            stream, a);
        if (grid.chunks > 1) {
          device::sum_log_det(op, a.partial, a.log_det, a.inverse, a.rows, grid.chunks, stream);
        }
      });
}

void coupling_backward_cuda(const CouplingArgs& a, void* stream) {
  // Operands that are not read have no say in the dtype, nor has the first where it is absent.
  const bool scales = a.scale != Scale::additive;
  const Operand x = scales ? a.x : Operand{}, shift = scales && a.inverse ? a.shift : Operand{};
  const device::Place first = a.dy.data       ? device::Place(a.dy)
                              : a.dx.data     ? device::Place(a.dx)
                              : a.dshift.data ? device::Place(a.dshift)
                                              : device::Place(a.draw);
  device::with_kernel(
      a, {first, a.dy, x, shift, a.raw, a.dx, a.dshift, a.draw},
      [&](auto type, auto grouped, auto scale, auto inverse, const device::RowGrid& grid) {
        using T = decltype(type);
        device::launch_rows("affine_coupling_backward",
                            &device::coupling_backward_kernel<T, grouped, scale, inverse>, grid,
                            stream, a);
      });
}

}  // namespace gm
