#include "attention/attention.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "common/head_checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// What each query sees, and the scratch that args point into.
struct Ranges {
  std::vector<int32_t> low, high;
  std::vector<uint8_t> mask;
};

// The keys of the sequence that each token lies in; none past the last one.
static void pack_sequences(const Layout& layout, const Tensor& offsets, int64_t tokens,
                           Ranges& ranges) {
  const bool is_long = offsets.scalar_type() == ScalarType::Long;
  const auto at = [&](int64_t i) {
    return is_long ? ((const int64_t*)offsets.data_ptr())[i]
                   : (int64_t)((const int32_t*)offsets.data_ptr())[i];
  };
  const int64_t count = offsets.size(0);
  GM_CHECK(at(0) == 0 && at(count - 1) == tokens, layout.op,
           ": cu_seqlens must begin with 0 and end with the number of tokens ", tokens,
           ", got a vector of ", count, " from ", at(0), " to ", at(count - 1));
  for (int64_t s = 0; s + 1 < count; ++s) {
    const int64_t begin = at(s), end = at(s + 1);
    GM_CHECK(begin <= end && end <= tokens, layout.op,
             ": cu_seqlens must never decrease, but a sequence would have length ", end - begin);
    std::fill(ranges.low.begin() + begin, ranges.low.begin() + end, (int32_t)begin);
    std::fill(ranges.high.begin() + begin, ranges.high.begin() + end, (int32_t)end);
  }
}

static void check_key_mask(const Layout& layout, const Tensor& mask, const AttentionArgs& a) {
  layout.check_device("key_mask", mask);
  GM_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == a.batches &&
               mask.size(1) == a.keys,
           layout.op, ": key_mask must be a bool tensor of shape (", a.batches, ", ", a.keys,
           "), got ", shape_text(mask));
}

static void check_offsets(const Layout& layout, const Tensor& offsets, const AttentionArgs& a) {
  layout.check_device("cu_seqlens", offsets);
  GM_CHECK(a.batches == 1 && a.queries == a.keys, layout.op,
           ": packed sequences have a batch of 1 and as many keys as queries");
  GM_CHECK(offsets.scalar_type() == ScalarType::Long || offsets.scalar_type() == ScalarType::Int,
           layout.op, ": cu_seqlens must be int64 or int32");
  GM_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.is_contiguous(), layout.op,
           ": cu_seqlens must be a contiguous vector of S + 1 offsets");
}

// Narrows the ranges of each batch to its first and last seen key; hands the mask on if keys
// between them are hidden.
static void apply_key_mask(const Tensor& mask, AttentionArgs& a, Ranges& ranges) {
  ranges.mask.resize(a.batches * a.keys);
  ranges.low.resize(a.batches * a.queries);
  ranges.high.resize(a.batches * a.queries);
  bool holes = false;
  for (int64_t b = a.batches - 1; b >= 0; --b) {
    int64_t first = a.keys, last = 0, seen = 0;
    for (int64_t j = 0; j < a.keys; ++j) {
      const uint8_t see =
          ((const uint8_t*)mask.data_ptr())[b * mask.stride(0) + j * mask.stride(1)];
      ranges.mask[b * a.keys + j] = see;
      if (!see) continue;
      first = std::min(first, j);
      last = j + 1;
      ++seen;
    }
    holes |= seen > 0 && seen < last - first;
    for (int64_t i = 0; i < a.queries; ++i) {
      ranges.low[b * a.queries + i] = std::max(ranges.low[i], (int32_t)first);
      ranges.high[b * a.queries + i] = std::min(ranges.high[i], (int32_t)last);
    }
  }
  a.range_stride = a.queries;
  if (holes) a.key_mask = ranges.mask.data();
}

// The same intervals as visible_range() of reference.py.
static void find_ranges(const Layout& layout, const MaybeTensor& key_mask,
                        const MaybeTensor& cu_seqlens, bool causal, int64_t window,
                        AttentionArgs& a, Ranges& ranges) {
  ranges.low.assign(a.queries, 0);
  ranges.high.assign(a.queries, (int32_t)a.keys);
  a.range_stride = 0;
  if (cu_seqlens) {
    check_offsets(layout, *cu_seqlens, a);
    pack_sequences(layout, *cu_seqlens, a.queries, ranges);
  }
  for (int64_t i = 0; causal && i < a.queries; ++i) {
    const int64_t position = i + a.keys - a.queries;
    const int64_t high = std::max<int64_t>(position + 1, 0);
    ranges.high[i] = std::min(ranges.high[i], (int32_t)high);
    if (window > 0)
      ranges.low[i] = std::max(ranges.low[i], (int32_t)std::max<int64_t>(high - window, 0));
  }
  if (key_mask) {
    check_key_mask(layout, *key_mask, a);
    apply_key_mask(*key_mask, a, ranges);
  }
  a.lo = ranges.low.data();
  a.hi = ranges.high.data();
}

static AttentionArgs read_args(const Layout& layout, const Tensor& q, const Tensor& k,
                               const MaybeTensor& v, double scale, double softcap) {
  AttentionArgs a;
  a.q = heads_of(layout, "q", q);
  a.k = heads_of(layout, "k", k);
  if (v) a.v = heads_of(layout, "v", *v);
  a.has_values = v.has_value();
  a.batches = q.size(0);
  a.heads = q.size(1);
  a.queries = q.size(2);
  a.width = q.size(3);
  a.kv_heads = k.size(1);
  a.keys = k.size(2);
  GM_CHECK(a.k.dtype == a.q.dtype && (!v || a.v.dtype == a.q.dtype), layout.op,
           ": q, k and v must have one dtype");
  GM_CHECK(k.size(0) == a.batches && k.size(3) == a.width && a.kv_heads >= 1 &&
               a.heads % a.kv_heads == 0,
           layout.op, ": k must have q's batch and width, and heads that divide q's, got ",
           shape_text(q), " and ", shape_text(k));
  for (int64_t i = 0; v && i < 4; ++i)
    GM_CHECK(v->size(i) == k.size(i), layout.op, ": v must have k's shape ", shape_text(k),
             ", got ", shape_text(*v));
  const int64_t longest = std::numeric_limits<int32_t>::max() / 2;
  GM_CHECK(a.width >= 1 && a.width <= 256 && a.queries < longest && a.keys < longest, layout.op,
           ": D must lie in [1, 256] and T below 2^30, got ", shape_text(q));
  GM_CHECK(scale >= 0.0 && softcap >= 0.0, layout.op, ": scale and softcap must be >= 0");
  a.scale = (float)scale;
  a.softcap = (float)softcap;
  return a;
}

#if defined(GM_CUDA)
// A call on the GPU, and the memory that it points into.
struct CudaCall {
  CudaScope scope;
  AttentionCudaArgs args;
  MaybeTensor mask, bounds, statistics;

  CudaCall(const Layout& layout, const AttentionArgs& a, const Tensor& q,
           const MaybeTensor& key_mask, const MaybeTensor& cu_seqlens, bool causal, int64_t window)
      : scope(layout.device) {
    (AttentionArgs&)args = a;
    args.causal = causal;
    args.window = (int32_t)std::clamp<int64_t>(window, 0, a.keys);
    if (key_mask) {
      check_key_mask(layout, *key_mask, a);
      mask = torch::stable::contiguous(*key_mask);
      args.key_mask = (const uint8_t*)mask->data_ptr();
    }
    if (!cu_seqlens) return;
    check_offsets(layout, *cu_seqlens, a);
    args.offsets = cu_seqlens->data_ptr();
    args.long_offsets = cu_seqlens->scalar_type() == ScalarType::Long;
    args.sequences = cu_seqlens->size(0) - 1;
    const int64_t sizes[2] = {2, a.queries};
    bounds = allocate(layout.op, q, sizes, 2, ScalarType::Float);  // room for int32
    args.bounds = (int32_t*)bounds->data_ptr();
  }

  void allocate_statistics(const Layout& layout, const Tensor& q) {
    const int64_t sizes[3] = {args.batches * args.heads, padded_queries(args.queries), 2};
    statistics = allocate(layout.op, q, sizes, 3, ScalarType::Float);
    args.statistics = (float*)statistics->data_ptr();
  }
};
#endif

// Runs body over tasks, on the caller's thread if the whole call is small.
template <class Body>
static void run_tasks(const AttentionArgs& a, int64_t tasks, const Body& body) {
  if (tasks == 0) return;
  const double work = (double)a.batches * a.heads * a.queries * (a.keys + 16) * a.width;
  if (tasks == 1 || work < 1e5) return body((int64_t)0, tasks);
  torch::stable::parallel_for(0, tasks, 1, body);
}

static Two attention_forward(const Tensor& q, const Tensor& k, const MaybeTensor& v,
                             const MaybeTensor& key_mask, const MaybeTensor& cu_seqlens,
                             bool causal, int64_t window, double scale, double softcap) {
  const Layout layout("attention", q);
  AttentionArgs a = read_args(layout, q, k, v, scale, softcap);
  const Tensor o = v ? allocate_like(layout.op, q) : allocate_nothing(layout.op, q);
  const int64_t sizes[3] = {a.batches, a.heads, a.queries};
  const Tensor lse = allocate(layout.op, q, sizes, 3, ScalarType::Float);
  a.o_out = o.data_ptr();
  a.lse_out = (float*)lse.data_ptr();
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    const CudaCall call(layout, a, q, key_mask, cu_seqlens, causal, window);
    attention_forward_cuda(call.args, call.scope.stream());
#endif
    return {o, lse};
  }
  Ranges ranges;
  find_ranges(layout, key_mask, cu_seqlens, causal, window, a, ranges);
  const AttentionTable& table = select_attention(a.q.dtype);
  run_tasks(a, a.batches * a.heads * a.tiles(),
            [&](int64_t begin, int64_t end) { table.forward(a, begin, end); });
  return {o, lse};
}

// A contiguous float32 [B, H, Tq], as the kernels read it.
static Tensor statistic(const Layout& layout, const AttentionArgs& a, const char* name,
                        const Tensor& x) {
  layout.check_device(name, x);
  GM_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 3 && x.size(0) == a.batches &&
               x.size(1) == a.heads && x.size(2) == a.queries,
           layout.op, ": ", name, " must be a float32 tensor [B, H, Tq], got ", shape_text(x));
  return torch::stable::contiguous(x);
}

// Tasks a key head is cut into: enough for 16 threads where heads are few, each with sums of its
// own in memory; a matter of the shape alone, so that results are the same for any number of
// threads.
static int64_t parts_of(const AttentionArgs& a) {
  constexpr int64_t kTasks = 16;
  const int64_t pairs = std::max<int64_t>(a.batches * a.kv_heads, 1);
  return std::clamp<int64_t>((kTasks + pairs - 1) / pairs, 1, std::max<int64_t>(a.tiles() / 2, 1));
}

static Three attention_backward(const MaybeTensor& dout, const MaybeTensor& dlse, const Tensor& o,
                                const Tensor& lse, const Tensor& q, const Tensor& k,
                                const MaybeTensor& v, const MaybeTensor& key_mask,
                                const MaybeTensor& cu_seqlens, bool causal, int64_t window,
                                double scale, double softcap, int64_t needs) {
  const Layout layout("attention_backward", q);
  AttentionArgs a = read_args(layout, q, k, v, scale, softcap);
  if (dout && v) {  // without v there is no o whose gradient could matter
    a.dout = heads_of(layout, "do", *dout);
    a.o = heads_of(layout, "o", o);
    for (int64_t i = 0; i < 4; ++i)
      GM_CHECK(dout->size(i) == q.size(i) && o.size(i) == q.size(i), layout.op,
               ": o and its gradient must have q's shape ", shape_text(q));
    GM_CHECK(a.dout.dtype == a.q.dtype && a.o.dtype == a.q.dtype, layout.op,
             ": o and its gradient must have q's dtype");
  }
  const Tensor statistics[2] = {statistic(layout, a, "lse", lse),
                                dlse ? statistic(layout, a, "dlse", *dlse) : lse};
  a.lse = (const float*)statistics[0].data_ptr();
  a.dlse = dlse ? (const float*)statistics[1].data_ptr() : nullptr;
  const auto wanted = [&](int bit, const MaybeTensor& like, void*& slot) {
    if (!(needs >> bit & 1) || !like) return allocate_nothing(layout.op, q);
    const Tensor gradient = allocate_like(layout.op, *like);
    slot = gradient.data_ptr();
    return gradient;
  };
  const Tensor dq = wanted(0, q, a.dq), dk = wanted(1, k, a.dk), dv = wanted(2, v, a.dv);
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaCall call(layout, a, q, key_mask, cu_seqlens, causal, window);
    call.allocate_statistics(layout, q);
    attention_backward_cuda(call.args, call.scope.stream());
#endif
    return {dq, dk, dv};
  }
  Ranges ranges;
  find_ranges(layout, key_mask, cu_seqlens, causal, window, a, ranges);
  a.parts = parts_of(a);
  const int64_t pairs = a.batches * a.kv_heads;
  std::unique_ptr<float[]> partial;
  if (a.parts > 1) {
    partial.reset(new float[pairs * a.parts * 2 * a.keys * padded(a.width)]);
    a.partial = partial.get();
  }
  const AttentionTable& table = select_attention(a.q.dtype);
  run_tasks(a, pairs * a.parts, [&](int64_t begin, int64_t end) { table.backward(a, begin, end); });
  if (a.partial)
    run_tasks(a, pairs * a.keys,
              [&](int64_t begin, int64_t end) { table.sum_parts(a, begin, end); });
  return {dq, dk, dv};
}

#define GM_PARAMETERS                                                                  \
  "Tensor q, Tensor k, Tensor? v, Tensor? key_mask, Tensor? cu_seqlens, bool causal, " \
  "int window, float scale, float softcap"

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("attention_forward(" GM_PARAMETERS ") -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor? do, Tensor? dlse, Tensor o, Tensor lse, " GM_PARAMETERS
        ", int needs) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace gm
