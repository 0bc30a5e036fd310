// Attention of a few new queries of each sequence to a cache. The formula stands in
// gmkernels/ops/decode/reference.py; the names are the same there and here.
#pragma once

#include <algorithm>

#include "common/heads.h"
#include "common/isa.h"

namespace gm {

constexpr int64_t kPart = 1024;  // keys of a part; parts are cut at its multiples

// What a part gives for a row of queries: padded(D) floats, the sum of p v, then the largest score
// (in units of 2^x) and the sum of p, and 14 that are not used.
constexpr int64_t kTop = 0, kSum = 1, kStatistics = 16;

// What CPU and CUDA kernels are told alike.
struct DecodeShape {
  Heads q, k, v;  // [B, H, T, D], [B, Hkv, S, D] twice; k and v of one dtype
  int64_t batches, heads, kv_heads, queries, width;
  int64_t window;  // 0: none

  // Queries of all heads that share a key head: row g T + i is query i of the head's g-th head.
  int64_t rows() const { return heads / kv_heads * queries; }
};

struct DecodeArgs : DecodeShape {
  float scale, softcap;              // softcap 0: none
  const int64_t* lengths = nullptr;  // [B], in [0, S]
  const int64_t* parts = nullptr;    // [B + 1]: parts of the rows before each
  float* partial = nullptr;          // [parts, Hkv, rows(), slot()] on a cache line
  void* o_out = nullptr;             // [B, H, T, D] contiguous, in q's dtype

  int64_t slot() const { return padded(width) + kStatistics; }
  // The keys [first_key(), last_key()) that query i of batch b sees.
  int64_t last_key(int64_t b, int64_t i) const {
    return std::max<int64_t>(lengths[b] - queries + 1 + i, 0);
  }
  int64_t first_key(int64_t b, int64_t i) const {
    return window > 0 ? std::max<int64_t>(last_key(b, i) - window, 0) : 0;
  }
  int64_t first_part(int64_t b) const { return first_key(b, 0) / kPart; }
  int64_t parts_of(int64_t b) const { return parts[b + 1] - parts[b]; }
  int64_t tasks() const { return parts[batches] * kv_heads; }
  // What the n-th part of a row gives for a query of a key head: its values, and what follows them.
  float* values(int64_t b, int64_t kv_head, int64_t n, int64_t row) const {
    const int64_t head = parts[b] * kv_heads + kv_head * parts_of(b);
    return partial + ((head + n) * rows() + row) * slot();
  }
  float* statistics(int64_t b, int64_t kv_head, int64_t n, int64_t row) const {
    return values(b, kv_head, n, row) + padded(width);
  }
};

struct DecodeTable {
  // Tasks: a part of a (batch, key head) each.
  void (*parts)(const DecodeArgs& args, int64_t begin, int64_t end);
  // Joins the parts in order; a task is a query of a (batch, head).
  void (*join)(const DecodeArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(DecodeTable, decode_table)

constexpr int64_t kCudaPart = 256;  // keys of a part on the GPU, where a block takes one

// Lengths stay on the device, so the parts are those of the capacity.
struct DecodeCuda : DecodeShape {
  const void* lengths;  // [B], int64 or int32
  bool is_long;
  bool vector;  // set by the launcher: rows may be read 16 bytes at a time
  int64_t capacity, parts;
  float factor;          // takes products q k to powers of two, or to what tanh() gets
  float cap;             // takes tanh() to powers of two; 0: none
  float* sums;           // [B, Hkv, rows(), parts, D] scratch
  float *tops, *totals;  // [B, Hkv, rows(), parts] scratch
  void* o;               // [B, H, T, D] contiguous, in q's dtype
};

// stream is a cudaStream_t.
void decode_cuda(DecodeCuda args, void* stream);

}  // namespace gm
