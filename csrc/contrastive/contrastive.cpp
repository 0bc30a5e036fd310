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
  a.pairs = k ? a.rows : a.rows / 2;
  a.scale = (float)scale;
  return a;
}

// The same pass seen from the other rows.
static ContrastArgs turned(ContrastArgs a) {
  std::swap(a.own, a.other);
  std::swap(a.lse, a.other_lse);
  std::swap(a.dlse, a.other_dlse);
  return a;
}

// Runs body over tiles, on the caller's thread if the whole call is small.
template <class Body>
static void run_tiles(const ContrastArgs& a, const Body& body) {
  if (a.rows == 0) return;
  if ((double)a.rows * a.rows * a.width < 1e5) return body((int64_t)0, a.tiles());
  torch::stable::parallel_for(0, a.tiles(), 1, body);
}

static Tensor forward(const Layout& layout, ContrastArgs a, const Tensor& like) {
  const Tensor lse = allocate(layout.op, like, &a.rows, 1, ScalarType::Float);
  a.lse_out = (float*)lse.data_ptr();
  const ContrastTable& table = select_contrast(a.own.dtype);
  run_tiles(a, [&](int64_t begin, int64_t end) { table.forward(a, begin, end); });
  return lse;
}

static Two contrastive_forward(const Tensor& q, const MaybeTensor& k, double scale, bool both) {
  const Layout layout("contrastive", q);
  const ContrastArgs a = read_args(layout, q, k, scale);
  const int64_t none = 0;
  return {forward(layout, a, q), k && both ? forward(layout, turned(a), q)
                                           : allocate(layout.op, q, &none, 1, ScalarType::Float)};
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
  const ContrastTable& table = select_contrast(a.own.dtype);
  const auto gradient = [&](int bit, ContrastArgs pass, const MaybeTensor& like) {
    if (!(needs >> bit & 1) || !like) return allocate_nothing(layout.op, q);
    const Tensor made = allocate_like(layout.op, *like);
    pass.gradient = made.data_ptr();
    run_tiles(pass, [&](int64_t begin, int64_t end) { table.gradient(pass, begin, end); });
    return made;
  };
  return {gradient(0, a, q), gradient(1, turned(a), k)};
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
