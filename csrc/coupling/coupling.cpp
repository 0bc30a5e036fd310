#include "coupling/coupling.h"

#include <tuple>

#include "common/slot_checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// One [B, n * parts] tensor as the `index`-th of `parts` operands of n columns each.
static Operand part_of(const Layout& layout, const char* name, const Tensor& x, int64_t parts,
                       int64_t index, int64_t& columns) {
  Layout own(layout.op, x);
  GM_CHECK(own.rows == layout.rows && own.columns % parts == 0, layout.op, ": ", name,
           " must have ", layout.rows, " rows of a whole number of parts, got ", shape_text(x));
  Operand o = operand(own, name, x);
  layout.check_device(name, x);
  columns = own.columns / parts;
  o.data = (const char*)o.data + index * columns * (o.dtype == DType::f32 ? 4 : 2);
  return o;
}

static CouplingArgs read_args(const Layout& layout, const Tensor& x, const Tensor& shift,
                              const MaybeTensor& raw_scale, const MaybeTensor& order, int64_t begin,
                              int64_t scale, double clamp, bool inverse) {
  CouplingArgs a{};
  GM_CHECK(scale >= 0 && scale <= 3, layout.op, ": scale must be 0 to 3, got ", scale);
  a.scale = (Scale)scale;
  a.x = operand(layout, "x", x);
  const bool joint = !raw_scale && a.scale != Scale::additive;
  a.shift = part_of(layout, "shift", shift, joint ? 2 : 1, 0, a.part);
  if (a.scale != Scale::additive) {
    int64_t columns;
    a.raw = part_of(layout, "raw_scale", joint ? shift : *raw_scale, joint ? 2 : 1, joint, columns);
    GM_CHECK(columns == a.part, layout.op, ": raw_scale must have shift's columns");
  }
  read_order(layout, order, begin, a.part, inverse, a);
  a.rows = layout.rows;
  a.columns = layout.columns;
  a.clamp = (float)clamp;
  a.inverse = inverse;
  return a;
}

static Two affine_coupling_forward(const Tensor& x, const Tensor& shift,
                                   const MaybeTensor& raw_scale, const MaybeTensor& order,
                                   int64_t begin, int64_t scale, double clamp, bool inverse) {
  const Layout layout("affine_coupling", x);
  CouplingArgs a = read_args(layout, x, shift, raw_scale, order, begin, scale, clamp, inverse);
  const Tensor y = allocate_like(layout.op, x), log_det = allocate_rows(layout, x);
  a.y = slots_result(a, layout.op, y, a.columns);
  a.log_det = (float*)log_det.data_ptr();
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    const int64_t sizes[2] = {layout.rows, chunks_of(layout.columns)};
    MaybeTensor partial;  // freed after the launch: the allocator reuses it in stream order
    if (sizes[1] > 1) {
      partial = allocate(layout.op, x, sizes, 2, ScalarType::Float);
      a.partial = (float*)partial->data_ptr();
    }
    coupling_forward_cuda(a, scope.stream());
#endif
    return {y, log_det};
  }
  const CouplingTable& table = select_coupling_table();
  layout.sum_rows(a.log_det, a.sign(), 0.0, [&](double* sums, int64_t from, int64_t to) {
    table.forward(a, sums, from, to);
  });
  return {y, log_det};
}

static Three affine_coupling_backward(const MaybeTensor& dy, const MaybeTensor& dlog_det,
                                      const Tensor& x, const Tensor& shift,
                                      const MaybeTensor& raw_scale, const MaybeTensor& order,
                                      int64_t begin, int64_t scale, double clamp, bool inverse,
                                      int64_t needs) {
  const Layout layout("affine_coupling_backward", x);
  CouplingArgs a = read_args(layout, x, shift, raw_scale, order, begin, scale, clamp, inverse);
  a.dy = operand(layout, "dy", dy);
  a.dlog_det = row_operand(layout, "dlog_det", dlog_det);
  const auto wanted = [&](int bit, const MaybeTensor& like) {
    return needs >> bit & 1 && like ? allocate_like(layout.op, *like)
                                    : allocate_nothing(layout.op, x);
  };
  const Tensor dx = wanted(0, x), dshift = wanted(1, shift), draw = wanted(2, raw_scale);
  const bool joint = !raw_scale && a.scale != Scale::additive;
  a.dx = slots_result(a, layout.op, dx, a.columns);
  a.dshift = result(layout.op, dshift, joint ? 2 * a.part : a.part);
  a.draw = result(layout.op, draw, a.part);
  a.dshift.streaming = a.dshift.streaming && a.part % 16 == 0;
  if (joint && a.dshift.data) {
    a.draw = a.dshift;
    a.draw.data = (char*)a.draw.data + a.part * (a.draw.dtype == DType::f32 ? 4 : 2);
  }
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    coupling_backward_cuda(a, scope.stream());
#endif
    return {dx, dshift, draw};
  }
  const CouplingTable& table = select_coupling_table();
  layout.parallel([&](int64_t from, int64_t to) { table.backward(a, from, to); });
  return {dx, dshift, draw};
}

#define GM_PARAMETERS                                                                             \
  "Tensor x, Tensor shift, Tensor? raw_scale, Tensor? order, int begin, int scale, float clamp, " \
  "bool inverse"

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("affine_coupling_forward(" GM_PARAMETERS ") -> (Tensor, Tensor)");
  m.def("affine_coupling_backward(Tensor? dy, Tensor? dlog_det, " GM_PARAMETERS
        ", int needs) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("affine_coupling_forward", TORCH_BOX(&affine_coupling_forward));
  m.impl("affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
}

}  // namespace gm
