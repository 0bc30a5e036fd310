#include "contrastive/contrastive.h"

#include <tuple>

#include "common/checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;

static Heads rows_of(const Layout& layout, const char* name, const Tensor& x) {
  layout.check_device(name, x);
  const DType dtype = float_dtype(layout.op, name, x.scalar_type());
  GM_CHECK(x.dim() == 2 && (x.numel() == 0 || x.size(1) == 1 || x.stride(1) == 1), layout.op, ": ",
           name, " must have shape [N, D] and contiguous rows, got ", shape_text(x));
  return {x.data_ptr(), 0, 0, x.stride(0), dtype};
}

// Args whose own rows are those of q; others are k's, or q's again where there is no k.
static ContrastArgs read_args(const Layout& layout, const Tensor& q, const MaybeTensor& k,
                              double scale) {
  GM_CHECK(!layout.is_cuda, layout.op, ": has no CUDA C++ kernel; use backend='triton'");
  ContrastArgs a;
  a.own = rows_of(layout, "q", q);
  a.other = k ? rows_of(layout, "k", *k) : a.own;
  a.rows = q.size(0);
  a.width = q.size(1);
  GM_CHECK(a.width >= 1 && a.width < (int64_t)1 << 24 && a.rows < (int64_t)1 << 31, layout.op,
           ": D must lie in [1, 2^24) and N below 2^31, got ", shape_text(q));
  GM_CHECK(!k || (k->size(0) == a.rows && k->size(1) == a.width && a.other.dtype == a.own.dtype),
           layout.op, ": k must have q's shape and dtype, got ", shape_text(q), " and ",
           shape_text(*k));
  GM_CHECK(k || a.rows % 2 == 0, layout.op, ": without k the rows must be two views of N, got ",
           shape_text(q));
  a.symmetric = !k;
  a.pairs = k ? a.rows : a.rows / 2;
  a.scale = (float)scale;
  return a;
}

// The float32 memory of one call, freed with it.
class Memory {
 public:
  explicit Memory(const Tensor& like) : like_(like) {}
  float* floats(int64_t count) {
    kept_.push_back(allocate("contrastive", like_, &count, 1, ScalarType::Float));
    return (float*)kept_.back().data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> kept_;
};

using Round = void (*)(const ContrastArgs& args, int64_t round, int64_t begin, int64_t end);

// All visits of all pairs of tiles, on the caller's thread if the whole call is small.
static void run_rounds(ContrastArgs& a, const ContrastTable& table, Round visit, Memory& memory) {
  if (a.rows == 0) return;
  const bool small = (double)a.rows * a.rows * a.width < 1e5;
  const auto run = [&](int64_t tasks, const auto& body) {
    small ? body((int64_t)0, tasks) : torch::stable::parallel_for(0, tasks, 1, body);
  };
  a.turned = memory.floats(a.tiles() * kTile * padded(a.width));
  run(a.tiles(), [&](int64_t begin, int64_t end) { table.prepare(a, begin, end); });
  for (int64_t round = 0; round < a.rounds(); ++round)
    run(a.visits(round), [&](int64_t begin, int64_t end) { visit(a, round, begin, end); });
  run(a.tiles(), [&](int64_t begin, int64_t end) { table.finish(a, begin, end); });
}

static Two contrastive_forward(const Tensor& q, const MaybeTensor& k, double scale, bool both) {
  const Layout layout("contrastive", q);
  ContrastArgs a = read_args(layout, q, k, scale);
  Memory memory(q);
  const int64_t columns = k && both ? a.rows : 0;
  const Tensor lse = allocate(layout.op, q, &a.rows, 1, ScalarType::Float);
  const Tensor other_lse = allocate(layout.op, q, &columns, 1, ScalarType::Float);
  a.lse_out = (float*)lse.data_ptr();
  if (columns) a.other_lse_out = (float*)other_lse.data_ptr();
  a.own_running = memory.floats(a.tiles() * kTile * kOwnRunning);
  if (a.symmetric || columns) a.other_running = memory.floats(a.rows * kOtherRunning);
  const ContrastTable& table = select_contrast(a.own.dtype);
  run_rounds(a, table, table.forward, memory);
  return {lse, other_lse};
}

// A contiguous float32 [rows], as the kernels read it.
static Tensor statistic(const Layout& layout, const char* name, const Tensor& x) {
  layout.check_device(name, x);
  GM_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 1 && x.size(0) == layout.rows,
           layout.op, ": ", name, " must be a float32 tensor of one number a row, got ",
           shape_text(x));
  return torch::stable::contiguous(x);
}

static Two contrastive_backward(const MaybeTensor& drows, const MaybeTensor& dcolumns,
                                const Tensor& rows, const Tensor& columns, const Tensor& q,
                                const MaybeTensor& k, double scale, bool both, int64_t needs) {
  const Layout layout("contrastive_backward", q);
  ContrastArgs a = read_args(layout, q, k, scale);
  std::vector<Tensor> kept;
  const auto pointer = [&](const char* name, const Tensor& x) {
    kept.push_back(statistic(layout, name, x));
    return (const float*)kept.back().data_ptr();
  };
  if (drows) {
    a.lse = pointer("rows", rows);
    a.dlse = pointer("drows", *drows);
  }
  if (!k) {
    a.other_lse = a.lse;
    a.other_dlse = a.dlse;
  } else if (dcolumns && both) {
    a.other_lse = pointer("columns", columns);
    a.other_dlse = pointer("dcolumns", *dcolumns);
  }
  const auto gradient = [&](int bit, const MaybeTensor& like, void*& slot) {
    if (!(needs >> bit & 1) || !like) return allocate_nothing(layout.op, q);
    const Tensor made = allocate_like(layout.op, *like);
    slot = made.data_ptr();
    return made;
  };
  const Tensor dq = gradient(0, q, a.gradient), dk = gradient(1, k, a.other_gradient);
  if (!a.gradient && !a.other_gradient) return {dq, dk};
  Memory memory(q);
  const int64_t floats = a.rows * padded(a.width);
  if (a.gradient) a.own_sums = memory.floats(floats);
  if (a.other_gradient || a.symmetric) a.other_sums = memory.floats(floats);
  const ContrastTable& table = select_contrast(a.own.dtype);
  run_rounds(a, table, table.gradient, memory);
  return {dq, dk};
}

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("contrastive_forward(Tensor q, Tensor? k, float scale, bool both) -> (Tensor, Tensor)");
  m.def(
      "contrastive_backward(Tensor? drows, Tensor? dcolumns, Tensor rows, Tensor columns, "
      "Tensor q, Tensor? k, float scale, bool both, int needs) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("contrastive_forward", TORCH_BOX(&contrastive_forward));
  m.impl("contrastive_backward", TORCH_BOX(&contrastive_backward));
}

}  // namespace gm
