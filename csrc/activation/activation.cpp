#include "activation/activation.h"

#include "common/checks.h"

namespace gm {

static GeluArgs read_args(const Layout& layout, const Tensor& x) {
  GM_CHECK(!layout.is_cuda, layout.op, ": has no CUDA C++ kernel; use backend='triton'");
  GeluArgs a{};
  a.x = operand(layout, "x", x);
  a.columns = layout.columns;
  return a;
}

static Tensor gelu_forward(const Tensor& x) {
  const Layout layout("gelu", x);
  GeluArgs a = read_args(layout, x);
  const Tensor y = allocate_like(layout.op, x);
  a.y = result(layout.op, y, layout.columns);
  if (!a.y.data) return y;
  const ActivationTable& table = select_activation_table();
  layout.parallel([&](int64_t begin, int64_t end) { table.gelu(a, begin, end); });
  return y;
}

static Tensor gelu_backward(const MaybeTensor& dy, const Tensor& x, int64_t needs) {
  const Layout layout("gelu_backward", x);
  GeluArgs a = read_args(layout, x);
  a.dy = operand(layout, "dy", dy);
  const Tensor dx = Wanted{layout, needs}(0, x, x, a.dx);
  if (!a.dx.data) return dx;
  const ActivationTable& table = select_activation_table();
  layout.parallel([&](int64_t begin, int64_t end) { table.gelu_backward(a, begin, end); });
  return dx;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("gelu_forward(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor? dy, Tensor x, int needs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

}  // namespace gm
