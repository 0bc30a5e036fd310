#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention/backward.cuh"

namespace gm {
namespace device {

constexpr int kBoundsThreads = 256;

// The sequence of each token: bounds [2, Tq]; tokens of no sequence see nothing.
__global__ void __launch_bounds__(kBoundsThreads)
    attention_bounds_kernel(const __grid_constant__ AttentionCudaArgs a) {
  const int64_t i = blockIdx.x * (int64_t)kBoundsThreads + threadIdx.x;
  if (i >= a.queries) return;
  const auto offset = [&](int64_t s) {
    return a.long_offsets ? ((const int64_t*)a.offsets)[s] : ((const int32_t*)a.offsets)[s];
  };
  int64_t sequence = 0, end = a.sequences + 1;  // offsets that are i at most
  while (sequence < end) {
    const int64_t middle = (sequence + end) / 2;
    if (offset(middle) <= i) {
      sequence = middle + 1;
    } else {
      end = middle;
    }
  }
  const bool covered = sequence >= 1 && sequence <= a.sequences;
  const auto inside = [&](int64_t x) { return (int32_t)min(max(x, (int64_t)0), a.queries); };
  a.bounds[i] = inside(covered ? offset(sequence - 1) : i);
  a.bounds[a.queries + i] = inside(covered ? offset(sequence) : i);
}

static void check_launch(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// kernel(args...) on the stream; nothing where there are no blocks.
template <class... Parameters, class... Args>
static void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
                   int bytes, void* stream, const Args&... args) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(op) + ": batch, heads and tiles of T make " +
                             std::to_string(blocks) +
                             " blocks, a launch has 2^31 - 1 at most; split the batch");
  }
  if (bytes > 48 * 1024) {
    int device, most;
    check_launch(op, cudaGetDevice(&device));
    check_launch(op,
                 cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (bytes > most) {
      throw std::runtime_error(std::string(op) + ": needs " + std::to_string(bytes) +
                               " bytes of shared memory a block, this GPU has " +
                               std::to_string(most) + "; use backend='triton'");
    }
    check_launch(op,
                 cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  kernel<<<(unsigned)blocks, threads, bytes, (cudaStream_t)stream>>>(args...);
  check_launch(op, cudaGetLastError());
}

// A kernel with a tile of rows of each of `heads` heads a block.
template <class P>
static void launch_tiles(const char* op, void (*kernel)(AttentionCudaArgs), int64_t heads,
                         int64_t rows, void* stream, const AttentionCudaArgs& a) {
  const int64_t tiles = (rows + P::kRows - 1) / P::kRows;
  launch(op, kernel, a.batches * heads * tiles, P::kThreads, P::kBytes, stream, a);
}

static void fill_bounds(const char* op, const AttentionCudaArgs& a, void* stream) {
  if (!a.bounds) return;
  const int64_t blocks = (a.queries + kBoundsThreads - 1) / kBoundsThreads;
  launch(op, &attention_bounds_kernel, blocks, kBoundsThreads, 0, stream, a);
}

template <int kWidth>
using Width = std::integral_constant<int, kWidth>;

// Calls body(T{}, Width<>{}) with the dtype and the narrowest tile that holds the heads.
template <class Body>
static void with_tile(const AttentionCudaArgs& a, Body body) {
  const auto run = [&](auto type) {
    if (a.width <= 64) return body(type, Width<64>{});
    if (a.width <= 128) return body(type, Width<128>{});
    body(type, Width<256>{});
  };
  if (a.q.dtype == DType::f32) return run(float{});
  if (a.q.dtype == DType::bf16) return run(__nv_bfloat16{});
  run(__half{});
}

}  // namespace device

void attention_forward_cuda(const AttentionCudaArgs& a, void* stream) {
  const char* op = "attention";
  device::fill_bounds(op, a, stream);
  device::with_tile(a, [&](auto type, auto width) {
    using P = device::ForwardPlan<decltype(type), decltype(width)::value>;
    device::launch_tiles<P>(op, &device::attention_forward_kernel<P>, a.heads, a.queries, stream,
                            a);
  });
}

void attention_backward_cuda(const AttentionCudaArgs& a, void* stream) {
  const char* op = "attention_backward";
  device::fill_bounds(op, a, stream);
  device::with_tile(a, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int kWidth = decltype(width)::value;
    constexpr int kRows = device::kStatisticsThreads / device::kStatisticsLanes;
    const int64_t rows = a.batches * a.heads * padded_queries(a.queries);
    device::launch(op, &device::attention_statistics_kernel<T>, (rows + kRows - 1) / kRows,
                   device::kStatisticsThreads, 0, stream, a, rows);
    using Q = device::QueryPlan<T, kWidth>;
    using K = device::KeyPlan<T, kWidth>;
    const auto keys = [&](auto kernel) {
      device::launch_tiles<K>(op, kernel, a.kv_heads, a.keys, stream, a);
    };
    if (a.dq) {
      device::launch_tiles<Q>(op, &device::attention_dq_kernel<Q>, a.heads, a.queries, stream, a);
    }
    if constexpr (kWidth == 256) {  // registers hold one of two sums
      if (a.dk) keys(&device::attention_dkdv_kernel<K, true, false>);
      if (a.dv) keys(&device::attention_dkdv_kernel<K, false, true>);
    } else if (a.dk || a.dv) {
      keys(&device::attention_dkdv_kernel<K, true, true>);
    }
  });
}

}  // namespace gm
