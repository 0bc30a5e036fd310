#include "decode/decode.h"

#include <limits>
#include <vector>

#include "common/head_checks.h"

namespace gm {

static DecodeArgs read_args(const Layout& layout, const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& lengths, int64_t window, double scale, double softcap) {
  DecodeArgs a;
  a.q = heads_of(layout, "q", q);
  a.k = heads_of(layout, "k_cache", k);
  a.v = heads_of(layout, "v_cache", v);
  a.batches = q.size(0);
  a.heads = q.size(1);
  a.queries = q.size(2);
  a.width = q.size(3);
  a.kv_heads = k.size(1);
  GM_CHECK(k.size(0) == a.batches && k.size(3) == a.width && a.kv_heads >= 1 &&
               a.heads % a.kv_heads == 0,
           layout.op, ": k_cache must have q's batch and width, and heads that divide q's, got ",
           shape_text(q), " and ", shape_text(k));
  GM_CHECK(a.v.dtype == a.k.dtype, layout.op, ": the caches must have one dtype");
  for (int64_t i = 0; i < 4; ++i)
    GM_CHECK(v.size(i) == k.size(i), layout.op, ": v_cache must have k_cache's shape ",
             shape_text(k), ", got ", shape_text(v));
  GM_CHECK(a.width >= 1 && a.width <= 256 && k.size(2) < std::numeric_limits<int32_t>::max() / 2,
           layout.op, ": D must lie in [1, 256] and S below 2^30, got ", shape_text(k));
  GM_CHECK(window >= 0 && scale >= 0.0 && softcap >= 0.0, layout.op,
           ": window, scale and softcap must be >= 0");
  const ScalarType type = lengths.scalar_type();
  layout.check_device("lengths", lengths);
  GM_CHECK((type == ScalarType::Long || type == ScalarType::Int) && lengths.dim() == 1 &&
               lengths.size(0) == a.batches && lengths.is_contiguous(),
           layout.op, ": lengths must be a contiguous int64 or int32 vector of ", a.batches);
  a.window = window;
  a.scale = (float)scale;
  a.softcap = (float)softcap;
  return a;
}

// Lengths within the capacity, and how many parts lie before each row.
struct Rows {
  std::vector<int64_t> lengths, parts;

  Rows(DecodeArgs& a, const Tensor& given, int64_t capacity)
      : lengths(a.batches), parts(a.batches + 1) {
    const bool is_long = given.scalar_type() == ScalarType::Long;
    a.lengths = lengths.data();
    a.parts = parts.data();
    for (int64_t b = 0; b < a.batches; ++b) {
      const int64_t length =
          is_long ? ((const int64_t*)given.data_ptr())[b] : ((const int32_t*)given.data_ptr())[b];
      lengths[b] = std::clamp<int64_t>(length, 0, capacity);
      const int64_t end = (lengths[b] + kPart - 1) / kPart;
      parts[b + 1] = parts[b] + (a.rows() > 0 && end > 0 ? end - a.first_part(b) : 0);
    }
  }
};

// Runs body over tasks, on the caller's thread if they are little work.
template <class Body>
static void run_tasks(int64_t tasks, double work, const Body& body) {
  if (tasks == 0) return;
  if (tasks == 1 || work < 1e5) return body((int64_t)0, tasks);
  torch::stable::parallel_for(0, tasks, 1, body);
}

#if defined(GM_CUDA)
static void run_cuda(const Layout& layout, const DecodeArgs& a, const Tensor& q,
                     const Tensor& lengths, int64_t capacity) {
  DecodeCuda c{};
  static_cast<DecodeShape&>(c) = a;
  c.lengths = lengths.data_ptr();
  c.is_long = lengths.scalar_type() == ScalarType::Long;
  c.capacity = capacity;
  c.parts = (capacity + kCudaPart - 1) / kCudaPart;
  c.factor = a.softcap > 0.0f ? a.scale / a.softcap : a.scale * kLog2E;
  c.cap = a.softcap * kLog2E;
  c.o = a.o_out;
  // Freed after the launch: the allocator reuses it in stream order.
  const int64_t slots = a.batches * a.kv_heads * a.rows() * c.parts, floats = slots * (a.width + 2);
  const Tensor scratch = allocate(layout.op, q, &floats, 1, ScalarType::Float);
  c.sums = (float*)scratch.data_ptr();
  c.tops = c.sums + slots * a.width;
  c.totals = c.tops + slots;
  CudaScope scope(layout.device);
  decode_cuda(c, scope.stream());
}
#endif

static Tensor decode_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& lengths, int64_t window, double scale,
                                       double softcap) {
  const Layout layout("decode_attention", q);
  DecodeArgs a = read_args(layout, q, k, v, lengths, window, scale, softcap);
  const Tensor o = allocate_like(layout.op, q);
  a.o_out = o.data_ptr();
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    run_cuda(layout, a, q, lengths, k.size(2));
#endif
    return o;
  }
  const Rows rows(a, lengths, k.size(2));
  const int64_t floats = a.tasks() * a.rows() * a.slot();
  const Tensor partial = allocate(layout.op, q, &floats, 1, ScalarType::Float);
  a.partial = (float*)partial.data_ptr();
  const DecodeTable& table = select_decode_table();
  const double row_work = (double)a.rows() * a.width;
  run_tasks(a.tasks(), (double)a.tasks() * kPart * row_work,
            [&](int64_t begin, int64_t end) { table.parts(a, begin, end); });
  run_tasks(a.batches * a.heads * a.queries, (double)a.tasks() * row_work,
            [&](int64_t begin, int64_t end) { table.join(a, begin, end); });
  return o;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def(
      "decode_attention_forward(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "int window, float scale, float softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("decode_attention_forward", TORCH_BOX(&decode_attention_forward));
}

}  // namespace gm
