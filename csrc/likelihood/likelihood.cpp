#include "likelihood/likelihood.h"

#include <cmath>
#include <tuple>

#include "common/checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

static const double kHalfLog2Pi = 0.91893853320467274178;

static void check_cpu(const Layout& layout) {
  GM_CHECK(!layout.is_cuda, layout.op, ": has no CUDA C++ kernel; use backend='triton'");
}

static Tensor gaussian_nll_forward(const Tensor& x, const Tensor& mean, const MaybeTensor& logvar) {
  const Layout layout("gaussian_nll", x);
  check_cpu(layout);
  LikelihoodArgs a;
  a.x = operand(layout, "x", x);
  a.mean = operand(layout, "mean", mean);
  const bool per_row = logvar && logvar->dim() == 1 && x.dim() > 1;
  a.logvar = per_row ? row_operand(layout, "logvar", logvar) : operand(layout, "logvar", logvar);
  a.columns = layout.columns;
  const Tensor nll = allocate_rows(layout, x);
  const LikelihoodTable& table = select_likelihood_table();
  layout.sum_rows(
      (float*)nll.data_ptr(), 0.5, kHalfLog2Pi * (double)layout.columns,
      [&](double* sums, int64_t begin, int64_t end) { table.gaussian(a, sums, begin, end); });
  return nll;
}

static Three gaussian_nll_backward(const Tensor& dnll, const Tensor& x, const Tensor& mean,
                                   const MaybeTensor& logvar, int64_t needs) {
  const Layout layout("gaussian_nll_backward", x);
  check_cpu(layout);
  LikelihoodArgs a;
  a.x = operand(layout, "x", x);
  a.mean = operand(layout, "mean", mean);
  const bool per_row = logvar && logvar->dim() == 1 && x.dim() > 1;
  a.logvar = per_row ? row_operand(layout, "logvar", logvar) : operand(layout, "logvar", logvar);
  a.dnll = row_operand(layout, "dnll", dnll);
  a.columns = layout.columns;
  const Wanted wanted{layout, needs};
  const Tensor dx = wanted(0, x, x, a.dx), dmean = wanted(1, mean, x, a.dmean);
  const LikelihoodTable& table = select_likelihood_table();
  if (per_row && needs >> 2 & 1) {
    const Tensor sums = allocate_rows(layout, x);
    layout.sum_rows((float*)sums.data_ptr(), 1.0, 0.0,
                    [&](double* partial, int64_t begin, int64_t end) {
                      table.gaussian_backward(a, partial, begin, end);
                    });
    return {dx, dmean, torch::stable::to(sums, logvar->scalar_type())};
  }
  const Tensor dlogvar = per_row ? allocate_nothing(layout.op, x) : wanted(2, logvar, x, a.dlogvar);
  layout.parallel(
      [&](int64_t begin, int64_t end) { table.gaussian_backward(a, nullptr, begin, end); });
  return {dx, dmean, dlogvar};
}

static Tensor bernoulli_nll_forward(const Tensor& x, const Tensor& logits) {
  const Layout layout("bernoulli_nll", x);
  check_cpu(layout);
  LikelihoodArgs a;
  a.x = operand(layout, "x", x);
  a.mean = operand(layout, "logits", logits);
  a.columns = layout.columns;
  const Tensor nll = allocate_rows(layout, x);
  const LikelihoodTable& table = select_likelihood_table();
  layout.sum_rows((float*)nll.data_ptr(), 1.0, 0.0, [&](double* sums, int64_t begin, int64_t end) {
    table.bernoulli(a, sums, begin, end);
  });
  return nll;
}

static Two bernoulli_nll_backward(const Tensor& dnll, const Tensor& x, const Tensor& logits,
                                  int64_t needs) {
  const Layout layout("bernoulli_nll_backward", x);
  check_cpu(layout);
  LikelihoodArgs a;
  a.x = operand(layout, "x", x);
  a.mean = operand(layout, "logits", logits);
  a.dnll = row_operand(layout, "dnll", dnll);
  a.columns = layout.columns;
  const Wanted wanted{layout, needs};
  const Tensor dx = wanted(0, x, x, a.dx), dlogits = wanted(1, logits, x, a.dmean);
  const LikelihoodTable& table = select_likelihood_table();
  layout.parallel([&](int64_t begin, int64_t end) { table.bernoulli_backward(a, begin, end); });
  return {dx, dlogits};
}

static CategoricalArgs read_categorical(const Layout& layout, const Tensor& logits,
                                        const Tensor& levels) {
  check_cpu(layout);
  CategoricalArgs a;
  layout.check_device("levels", levels);
  const ScalarType dtype = levels.scalar_type();
  GM_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Byte,
           layout.op, ": levels must be int64, int32 or uint8");
  GM_CHECK(
      logits.dim() == levels.dim() + 1 && levels.is_contiguous() && logits.size(0) == layout.rows,
      layout.op, ": levels must be contiguous [B, *] and logits [B, *, L], got ",
      shape_text(levels), " and ", shape_text(logits));
  a.size = logits.size(logits.dim() - 1);
  GM_CHECK(a.size >= 1 && logits.numel() == levels.numel() * a.size, layout.op,
           ": logits must have levels' shape and at least one level, got ", shape_text(levels),
           " and ", shape_text(logits));
  const Layout rows("categorical_nll", logits);
  a.logits = operand(rows, "logits", logits);
  a.levels = levels.data_ptr();
  a.levels_dtype = dtype == ScalarType::Long  ? DType::i64
                   : dtype == ScalarType::Int ? DType::i32
                                              : DType::u8;
  a.levels_row_stride = layout.columns;
  a.rows = layout.rows;
  a.columns = layout.columns;
  return a;
}

static Tensor categorical_nll_forward(const Tensor& logits, const Tensor& levels) {
  const Layout layout("categorical_nll", levels);
  const CategoricalArgs a = read_categorical(layout, logits, levels);
  const Tensor nll = allocate_rows(layout, levels);
  const LikelihoodTable& table = select_likelihood_table();
  layout.sum_rows(
      (float*)nll.data_ptr(), 1.0, 0.0,
      [&](double* sums, int64_t begin, int64_t end) { table.categorical(a, sums, begin, end); },
      a.size);
  return nll;
}

static Tensor categorical_nll_backward(const Tensor& dnll, const Tensor& logits,
                                       const Tensor& levels, int64_t needs) {
  const Layout layout("categorical_nll_backward", levels);
  CategoricalArgs a = read_categorical(layout, logits, levels);
  a.dnll = row_operand(layout, "dnll", dnll);
  const Wanted wanted{layout, needs};
  const Tensor dlogits = wanted(0, logits, logits, a.dlogits);
  if (a.dlogits.data) {
    a.dlogits.row_stride = layout.columns * a.size;
    a.dlogits.streaming = false;  // blocks of levels start anywhere
    const LikelihoodTable& table = select_likelihood_table();
    layout.parallel([&](int64_t begin, int64_t end) { table.categorical_backward(a, begin, end); },
                    a.size);
  }
  return dlogits;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("gaussian_nll_forward(Tensor x, Tensor mean, Tensor? logvar) -> Tensor");
  m.def(
      "gaussian_nll_backward(Tensor dnll, Tensor x, Tensor mean, Tensor? logvar, int needs)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("bernoulli_nll_forward(Tensor x, Tensor logits) -> Tensor");
  m.def(
      "bernoulli_nll_backward(Tensor dnll, Tensor x, Tensor logits, int needs)"
      " -> (Tensor, Tensor)");
  m.def("categorical_nll_forward(Tensor logits, Tensor levels) -> Tensor");
  m.def("categorical_nll_backward(Tensor dnll, Tensor logits, Tensor levels, int needs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("gaussian_nll_forward", TORCH_BOX(&gaussian_nll_forward));
  m.impl("gaussian_nll_backward", TORCH_BOX(&gaussian_nll_backward));
  m.impl("bernoulli_nll_forward", TORCH_BOX(&bernoulli_nll_forward));
  m.impl("bernoulli_nll_backward", TORCH_BOX(&bernoulli_nll_backward));
  m.impl("categorical_nll_forward", TORCH_BOX(&categorical_nll_forward));
  m.impl("categorical_nll_backward", TORCH_BOX(&categorical_nll_backward));
}

}  // namespace gm
