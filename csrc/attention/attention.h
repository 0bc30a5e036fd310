// Attention over heads [B, H, T, D]: forward, log-sum-exp, backward. Derivations stand in
// gmkernels/ops/attention/reference.py; the names are the same there and here.
#pragma once

#include "common/heads.h"
#include "common/isa.h"

namespace gm {

// One call. Query i of batch b sees the keys [lo, hi) of [b * range_stride + i], both of which
// never decrease with i, but for those where key_mask is false.
struct AttentionArgs {
  Heads q, k, v, o, dout;       // dout is null where only lse has a gradient
  bool has_values = false;      // false for the log-sum-exp alone: no v, no o
  const float* lse = nullptr;   // backward: [B, H, Tq] contiguous
  const float* dlse = nullptr;  // [B, H, Tq] contiguous, or null
  int64_t batches, heads, kv_heads, queries, keys, width;
  const int32_t *lo, *hi;
  int64_t range_stride;
  const uint8_t* key_mask = nullptr;  // [B, Tk], null where no key in [lo, hi) is hidden
  float scale, softcap;               // softcap 0: none
  // Forward: contiguous outputs.
  void* o_out = nullptr;
  float* lse_out = nullptr;
  // Backward: contiguous gradients in q's dtype, null where not wanted.
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  int64_t parts = 1;         // tasks that share the tiles of one key head
  float* partial = nullptr;  // [B Hkv parts, 2, Tk, padded D]: their sums, if there are several

  int64_t group() const { return heads / kv_heads; }
  int64_t tiles() const { return (queries + kTile - 1) / kTile; }
};

// Queries in whole tiles.
GM_HD int64_t padded_queries(int64_t queries) { return (queries + kTile - 1) / kTile * kTile; }

// A call on the GPU: its kernels find what a query sees themselves. lo, hi, parts and partial are
// not used; k and v have k's rows, key_mask hides keys of any place.
struct AttentionCudaArgs : AttentionArgs {
  bool causal = false;
  int32_t window = 0;  // keys a query sees at most; 0: all
  // Packed sequences: offsets [sequences + 1] of int64 or int32, and bounds [2, Tq] to fill in, the
  // first and the end of the sequence of each token; null for one sequence.
  const void* offsets = nullptr;
  bool long_offsets = false;
  int64_t sequences = 0;
  int32_t* bounds = nullptr;
  // Backward: [B, H, padded_queries(Tq), 2] to fill in: lse in powers of two, delta.
  float* statistics = nullptr;
};

// On a stream. Raise std::runtime_error where CUDA refuses.
void attention_forward_cuda(const AttentionCudaArgs& args, void* stream);
void attention_backward_cuda(const AttentionCudaArgs& args, void* stream);

struct AttentionTable {
  // Tasks of the forward: a tile of queries each, tiles() of each (batch, head).
  void (*forward)(const AttentionArgs& args, int64_t begin, int64_t end);
  // Tasks of the backward: a part of a (batch, key head) each.
  void (*backward)(const AttentionArgs& args, int64_t begin, int64_t end);
  // Sums the parts in order; a task is a key of a (batch, key head).
  void (*sum_parts)(const AttentionArgs& args, int64_t begin, int64_t end);
};

GM_KERNEL_TABLE(AttentionTable, attention_table)

#if defined(GM_X86)
namespace v4_bf16 {
extern const AttentionTable attention_table;
}
#endif

// bfloat16 heads have kernels of their own where the CPU multiplies bfloat16.
inline const AttentionTable& select_attention(DType dtype) {
#if defined(GM_X86)
  if (dtype == DType::bf16 && active_isa.load(std::memory_order_relaxed) == Isa::v4_bf16)
    return v4_bf16::attention_table;
#endif
  return select_attention_table();
}

}  // namespace gm
