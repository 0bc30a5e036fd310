// Keys are cut into parts of kCudaPart; a block takes one, its warps share the keys. Lanes beside
// each other hold 16 bytes of a row, and the lanes of a key keep a maximum and sums of their own.
#include "common/math.h"
#include "common/rows.cuh"
#include "decode/decode.h"

namespace gm {
namespace device {

constexpr int kWarps = 4;         // of a block that takes a part
constexpr int kKeysInFlight = 4;  // of a lane
constexpr int kJoinWarps = 8;

// The keys [low, high) that query i of batch b sees.
struct Seen {
  int low, high;
};
static __device__ __forceinline__ Seen keys_seen(const DecodeCuda& c, int64_t b, int i) {
  int64_t n = c.is_long ? ((const int64_t*)c.lengths)[b] : ((const int32_t*)c.lengths)[b];
  n = n < 0 ? 0 : n > c.capacity ? c.capacity : n;
  const int64_t high = n - c.queries + 1 + i;
  if (high <= 0) return {0, 0};
  return {(int)(c.window > 0 && high > c.window ? high - c.window : 0), (int)high};
}

static __device__ __forceinline__ float read_float(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return ((const float*)p)[i];
  if (dtype == DType::f16) return widen(((const __half*)p)[i]);
  return widen(((const __nv_bfloat16*)p)[i]);
}
static __device__ __forceinline__ void write_float(float x, void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return narrow(x, ((float*)p)[i]);
  if (dtype == DType::f16) return narrow(x, ((__half*)p)[i]);
  narrow(x, ((__nv_bfloat16*)p)[i]);
}

// A lane's groups of a row of D values, `kLanes` lanes beside each other; 0 beyond D.
template <int kLanes, int kGroups, class T>
static __device__ __forceinline__ void load_lane(const T* row, int lane, int width, bool vector,
                                                 float (&x)[kGroups][kWidth<T>]) {
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int g = lane + i * kLanes, left = width - g * kWidth<T>;
    if (vector && left > 0) {
      load_group<true>(row, g, left, x[i]);
    } else {
      load_group<false>(row, g, left, x[i]);
    }
  }
}

// What is known of a row of queries: the largest score in units of 2^x, the sum of p, and a lane's
// share of the sum of p v.
template <int kGroups, int N>
struct Partial {
  float top = kHidden, total = 0.0f, sums[kGroups][N] = {};

  // Joins another over other keys. Two lanes that exchange theirs get the same bits.
  __device__ __forceinline__ void exchange(int offset) {
    const float other = __shfl_xor_sync(0xffffffffu, top, offset);
    const float most = other > top ? other : top;
    const float mine = exp2_nonpositive(top - most), theirs = exp2_nonpositive(other - most);
    total = total * mine + __shfl_xor_sync(0xffffffffu, total, offset) * theirs;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int e = 0; e < N; ++e)
        sums[i][e] = sums[i][e] * mine + __shfl_xor_sync(0xffffffffu, sums[i][e], offset) * theirs;
    }
    top = most;
  }
};

// A part of the keys of a (batch, key head) for kRows rows of queries, by a block.
template <class T, int kLanes, int kGroups, int kRows>
__global__ void __launch_bounds__(32 * kWarps) decode_part_kernel(
    // q [B, H, T, D] any dtype, k and v [B, Hkv, S, D] of dtype T; sums [B, Hkv, rows, parts, D],
    // tops and totals [B, Hkv, rows, parts]
    const __grid_constant__ DecodeCuda c) {
  constexpr int N = kWidth<T>, kSlots = 32 / kLanes, kKeys = kSlots * kKeysInFlight;
  constexpr int kWide = kLanes * kGroups * N;
  __shared__ float shared_sums[kWarps][kRows][kWide], shared_tops[kWarps][kRows];
  __shared__ float shared_totals[kWarps][kRows];
  const int part = blockIdx.x % c.parts, warp = threadIdx.x / 32;
  const int slot = threadIdx.x % 32 / kLanes, lane = threadIdx.x % kLanes;
  const int64_t pair = blockIdx.x / c.parts, b = pair / c.kv_heads, kv_head = pair % c.kv_heads;
  const int width = (int)c.width, queries = (int)c.queries, group = (int)(c.heads / c.kv_heads);
  const int rows = group * queries, first_row = blockIdx.y * kRows;

  float q[kRows][kGroups][N];
  Seen seen[kRows];
  int begin = INT32_MAX, end = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r;
    seen[r] = row < rows ? keys_seen(c, b, row % queries) : Seen{INT32_MAX, 0};
    begin = min(begin, seen[r].low);
    end = max(end, seen[r].high);
    const int64_t at =
        b * c.q.batch + (kv_head * group + row / queries) * c.q.head + row % queries * c.q.row;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const int d = (lane + i * kLanes) * N + e;
        const bool exists = row < rows && d < width;
        q[r][i][e] = exists ? read_float(c.q.data, c.q.dtype, at + d) * c.factor : 0.0f;
      }
    }
  }
  begin = max(begin, part * (int)kCudaPart);
  end = min(end, (part + 1) * (int)kCudaPart);
  if (begin >= end) return;

  const T* k_rows = (const T*)c.k.data + b * c.k.batch + kv_head * c.k.head;
  const T* v_rows = (const T*)c.v.data + b * c.v.batch + kv_head * c.v.head;
  Partial<kGroups, N> partial[kRows];
  for (int start = begin + warp * kKeys; start < end; start += kWarps * kKeys) {
    float k[kKeysInFlight][kGroups][N], v[kKeysInFlight][kGroups][N];
#pragma unroll
    for (int u = 0; u < kKeysInFlight; ++u) {
      const int64_t j = start + u * kSlots + slot;
      const int here = j < end ? width : 0;  // nothing is read beyond the last key that is seen
      load_lane<kLanes>(k_rows + j * c.k.row, lane, here, c.vector, k[u]);
      load_lane<kLanes>(v_rows + j * c.v.row, lane, here, c.vector, v[u]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float s[kKeysInFlight];
      Partial<kGroups, N>& known = partial[r];
      float top = known.top;
#pragma unroll
      for (int u = 0; u < kKeysInFlight; ++u) {
        s[u] = 0.0f;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
#pragma unroll
          for (int e = 0; e < N; ++e) s[u] = fma(q[r][i][e], k[u][i][e], s[u]);
        }
#pragma unroll
        for (int offset = kLanes / 2; offset; offset >>= 1)
          s[u] += __shfl_xor_sync(0xffffffffu, s[u], offset);
        if (c.cap > 0.0f) s[u] = tanh(s[u]) * c.cap;
        const int j = start + u * kSlots + slot;
        const bool is_seen = j >= seen[r].low && j < min(end, seen[r].high);
        s[u] = is_seen ? max_keeping_nan(s[u], kHidden) : kHidden;
        top = s[u] > top ? s[u] : top;
      }
      const float shrink = exp2_nonpositive(known.top - top);
      known.top = top;
      known.total *= shrink;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int e = 0; e < N; ++e) known.sums[i][e] *= shrink;
      }
#pragma unroll
      for (int u = 0; u < kKeysInFlight; ++u) {
        if (s[u] == kHidden) continue;  // not seen: its value may be NaN
        const float p = exp2_nonpositive(s[u] - top);
        known.total += p;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
#pragma unroll
          for (int e = 0; e < N; ++e) known.sums[i][e] = fma(p, v[u][i][e], known.sums[i][e]);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int offset = kLanes; offset < 32; offset <<= 1) partial[r].exchange(offset);
    if (slot != 0) continue;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int e = 0; e < N; ++e)
        shared_sums[warp][r][(lane + i * kLanes) * N + e] = partial[r].sums[i][e];
    }
    shared_tops[warp][r] = partial[r].top;
    shared_totals[warp][r] = partial[r].total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kWide; i += 32 * kWarps) {
    const int r = i / kWide, d = i % kWide;
    if (first_row + r >= rows || d >= width) continue;
    float top = shared_tops[0][r], total = 0.0f, sum = 0.0f;
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, shared_tops[w][r]);
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2_nonpositive(shared_tops[w][r] - top);
      total = fma(weight, shared_totals[w][r], total);
      sum = fma(weight, shared_sums[w][r][d], sum);
    }
    const int64_t at = (pair * rows + first_row + r) * c.parts + part;
    c.sums[at * width + d] = sum;
    if (d == 0) c.tops[at] = top, c.totals[at] = total;
  }
}

// Joins the parts of a row of queries, by a block: warp w takes every kJoinWarps-th of them.
__global__ void __launch_bounds__(32 * kJoinWarps) decode_join_kernel(
    // sums, tops, totals as above; o [B, H, T, D] contiguous in q's dtype
    const __grid_constant__ DecodeCuda c) {
  constexpr int kMost = 256 / 32;  // values of a lane
  __shared__ float shared_sums[kJoinWarps][256], shared_tops[kJoinWarps];
  __shared__ float shared_totals[kJoinWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = (int)c.width;
  // Rows lie as [B, H, T] do. Divisions in 32 bits: those in 64 are calls, and made registers
  // spill.
  const unsigned place = blockIdx.x, per_batch = (unsigned)(c.heads * c.queries);
  const Seen seen = keys_seen(c, place / per_batch, (int)(place % (unsigned)c.queries));
  const int64_t row = place;
  const int first = seen.low / (int)kCudaPart, last = (seen.high + kCudaPart - 1) / kCudaPart;
  const float *tops = c.tops + row * c.parts, *totals = c.totals + row * c.parts;

  float top = kHidden;
  for (int n = first + (int)threadIdx.x; n < last; n += 32 * kJoinWarps) top = fmaxf(top, tops[n]);
#pragma unroll
  for (int offset = 16; offset; offset >>= 1)
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  if (lane == 0) shared_tops[warp] = top;
  __syncthreads();
  for (int w = 0; w < kJoinWarps; ++w) top = fmaxf(top, shared_tops[w]);

  float total = 0.0f, sums[kMost] = {};
#pragma unroll 4
  for (int n = first + warp; n < last; n += kJoinWarps) {
    const float weight = exp2_nonpositive(tops[n] - top);
    total = fma(weight, totals[n], total);
    const float* part = c.sums + (row * c.parts + n) * width;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int d = lane + 32 * i;
      if (d < width) sums[i] = fma(weight, part[d], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) shared_sums[warp][lane + 32 * i] = sums[i];
  if (lane == 0) shared_totals[warp] = total;
  __syncthreads();
  float whole = 0.0f;
  for (int w = 0; w < kJoinWarps; ++w) whole += shared_totals[w];
  const float inverse = whole == 0.0f ? 0.0f : 1.0f / whole;
  for (int d = threadIdx.x; d < width; d += 32 * kJoinWarps) {
    float sum = 0.0f;
    for (int w = 0; w < kJoinWarps; ++w) sum += shared_sums[w][d];
    write_float(sum * inverse, c.o, c.q.dtype, row * width + d);
  }
}

template <class T, int kLanes, int kGroups>
static void launch_parts(const DecodeCuda& c, void* stream) {
  const auto launch = [&](auto kernel, int64_t rows) {
    const int64_t x = c.parts * c.batches * c.kv_heads, y = (c.rows() + rows - 1) / rows;
    kernel<<<dim3((unsigned)x, (unsigned)y), 32 * kWarps, 0, (cudaStream_t)stream>>>(c);
  };
  if (c.rows() == 1) return launch(&decode_part_kernel<T, kLanes, kGroups, 1>, 1);
  launch(&decode_part_kernel<T, kLanes, kGroups, 4>, 4);
}

// As few lanes a row as hold it, so that a warp reads several keys at once.
template <class T>
static void launch_width(const DecodeCuda& c, void* stream) {
  constexpr int kFew = 64 / kWidth<T>;
  if (c.width <= 64) return launch_parts<T, kFew, 1>(c, stream);
  if (c.width <= 128) return launch_parts<T, 2 * kFew, 1>(c, stream);
  launch_parts<T, 32, 8 / kWidth<T>>(c, stream);
}

static void launch_join(const DecodeCuda& c, void* stream) {
  const int64_t blocks = c.batches * c.heads * c.queries;
  decode_join_kernel<<<(unsigned)blocks, 32 * kJoinWarps, 0, (cudaStream_t)stream>>>(c);
}

// Do rows start at multiples of 16 bytes, and do 16 bytes tile them?
static bool has_vectors(const DecodeCuda& c) {
  const int64_t n = c.k.dtype == DType::f32 ? 4 : 8;
  bool all = c.width % n == 0;
  for (const Heads* x : {&c.k, &c.v})
    all = all && (uint64_t)x->data % 16 == 0 && x->batch % n == 0 && x->head % n == 0 &&
          x->row % n == 0;
  return all;
}

}  // namespace device

void decode_cuda(DecodeCuda c, void* stream) {
  const char* op = "decode_attention";
  if (c.batches * c.heads * c.queries == 0) return;
  c.vector = device::has_vectors(c);
  if (c.parts > 0) {
    if (c.k.dtype == DType::f32) {
      device::launch_width<float>(c, stream);
    } else if (c.k.dtype == DType::bf16) {
      device::launch_width<__nv_bfloat16>(c, stream);
    } else {
      device::launch_width<__half>(c, stream);
    }
    device::check_cuda(op, cudaGetLastError());
  }
  device::launch_join(c, stream);
  device::check_cuda(op, cudaGetLastError());
}

}  // namespace gm
