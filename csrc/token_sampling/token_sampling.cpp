#include "token_sampling/token_sampling.h"

#include <algorithm>

#include "common/checks.h"

namespace gm {

// The scratch of one thread, cut out of one piece of memory.
class ScratchMemory {
 public:
  explicit ScratchMemory(const SamplingArgs& a)
      : groups_(groups_of(a.columns)),
        row_(a.logits.dtype == DType::f32 ? kGroup : groups_ * kGroup),
        most_(std::max(groups_, a.top_k > 0 ? a.columns + 1 : 0)),
        floats_(row_ + groups_ + most_),
        mass_(a.share > 0 ? kBins : 0),
        candidates_(a.share > 0 ? a.columns : 0) {}

  SamplingScratch view() {
    float* x = floats_.data();
    return {x, x + row_, x + row_ + groups_, mass_.data(), candidates_.data()};
  }

 private:
  int64_t groups_, row_, most_;
  std::vector<float> floats_;
  std::vector<double> mass_;
  std::vector<Candidate> candidates_;
};

static Tensor next_token(const Tensor& logits, const Tensor& key, const Tensor& position,
                         double temperature, int64_t top_k, int64_t share) {
  const Layout layout("next_token", logits);
  GM_CHECK(!layout.is_cuda, layout.op, ": has no CUDA C++ kernel; use backend='triton'");
  GM_CHECK(logits.dim() == 2 && layout.columns <= (int64_t)1 << 20, layout.op,
           ": logits must have shape [B, V] with V at most 2^20, got ", shape_text(logits));
  GM_CHECK(temperature == 0.0 || (temperature >= 1e-6 && temperature <= 1e6), layout.op,
           ": temperature must be 0 or lie in [1e-6, 1e6], got ", temperature);
  GM_CHECK(top_k >= 0 && share >= 0 && share <= (int64_t)1 << 30, layout.op,
           ": top_k must be >= 0, share must lie in [0, 2^30]");
  SamplingArgs a{};
  a.logits = operand(layout, "logits", logits);
  a.columns = layout.columns;
  const Key k = read_key(layout.op, key, 0);
  GM_CHECK(!k.device, layout.op, ": the key must be on the CPU for CPU tensors");
  a.key = k.host;
  layout.check_device("position", position);
  GM_CHECK(position.scalar_type() == ScalarType::Long && position.dim() == 1 &&
               position.size(0) == layout.rows && position.is_contiguous(),
           layout.op, ": position must be a contiguous int64 vector of ", layout.rows,
           " elements, got ", shape_text(position));
  a.position = (const int64_t*)position.data_ptr();
  a.greedy = temperature == 0.0;
  a.sharpness = a.greedy ? 0.0f : (float)(1.0 / temperature);
  a.top_k = top_k;
  a.share = (double)share;
  const Tensor tokens = allocate(layout.op, logits, &layout.rows, 1, ScalarType::Long);
  a.tokens = (int64_t*)tokens.data_ptr();
  if (layout.columns == 0) {
    std::fill_n(a.tokens, layout.rows, kNoToken);
    return tokens;
  }
  const TokenSamplingTable& table = select_token_sampling_table();
  const auto rows = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    ScratchMemory memory(a);
    table.next_token(a, memory.view(), begin, end);
  };
  const int64_t grain = (1 << 14) / layout.columns + 1;
  if (layout.rows <= grain) {
    rows(0, layout.rows);
  } else {
    torch::stable::parallel_for(0, layout.rows, grain, rows);
  }
  return tokens;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def(
      "next_token(Tensor logits, Tensor key, Tensor position, float temperature, int top_k, "
      "int share) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("next_token", TORCH_BOX(&next_token));
}

}  // namespace gm
