#include "spline/spline.h"

#include <cmath>
#include <tuple>

#include "common/slot_checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kWork = 32;  // of one element, in those of an elementwise kernel

// The parameters [B, part, step] of a call: three tensors, or segments of one.
static void read_parameters(const Layout& layout, const Tensor& widths, const MaybeTensor& heights,
                            const MaybeTensor& derivatives, SplineArgs& a, int64_t& part) {
  const int64_t k = a.bins;
  GM_CHECK(heights.has_value() == derivatives.has_value(), layout.op,
           ": give heights and derivatives, or neither");
  const bool joint = a.joint = !heights;
  const MaybeTensor tensors[3] = {widths, heights, derivatives};
  const char* names[3] = {"widths", "heights", "derivatives"};
  for (int j = 0; j < 3; ++j) {
    const Tensor& x = joint ? widths : *tensors[j];
    const int64_t step = joint ? 3 * k - 1 : j == 2 ? k - 1 : k;
    const Layout own(layout.op, x);
    GM_CHECK(own.rows == layout.rows && own.columns % step == 0, layout.op, ": ", names[j],
             " must have ", layout.rows, " rows of a multiple of ", step, " values, got ",
             shape_text(x));
    layout.check_device(names[j], x);
    GM_CHECK(j == 0 || own.columns / step == part, layout.op, ": ", names[j],
             " must hold as many elements as widths");
    part = own.columns / step;
    a.raw[j] = operand(own, names[j], x);
    a.step[j] = step;
    if (joint) {
      a.raw[j].data = (const char*)a.raw[j].data + j * k * (a.raw[j].dtype == DType::f32 ? 4 : 2);
    }
  }
}

static SplineArgs read_args(const Layout& layout, const Tensor& x, const Tensor& widths,
                            const MaybeTensor& heights, const MaybeTensor& derivatives,
                            const MaybeTensor& order, int64_t begin, int64_t bins, double bound,
                            double min_width, double min_height, double min_derivative,
                            bool inverse) {
  SplineArgs a{};
  GM_CHECK(bins >= kMinBins && bins <= kMaxBins, layout.op, ": bins must be from ", kMinBins,
           " to ", kMaxBins, ", got ", bins);
  a.x = operand(layout, "x", x);
  a.bins = (int32_t)bins;
  int64_t part = 0;
  read_parameters(layout, widths, heights, derivatives, a, part);
  read_order(layout, order, begin, part, inverse, a);
  a.rows = layout.rows;
  a.columns = layout.columns;
  a.bound = (float)bound;
  a.min_width = (float)min_width;
  a.min_height = (float)min_height;
  a.min_derivative = (float)min_derivative;
  a.end_derivative = (float)std::log(std::expm1(1.0 - min_derivative));
  a.inverse = inverse;
  return a;
}

static Two spline_map_forward(const Tensor& x, const Tensor& widths, const MaybeTensor& heights,
                              const MaybeTensor& derivatives, const MaybeTensor& order,
                              int64_t begin, int64_t bins, double bound, double min_width,
                              double min_height, double min_derivative, bool inverse) {
  const Layout layout("spline_map", x);
  SplineArgs a = read_args(layout, x, widths, heights, derivatives, order, begin, bins, bound,
                           min_width, min_height, min_derivative, inverse);
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
    spline_forward_cuda(a, scope.stream());
#endif
    return {y, log_det};
  }
  const SplineTable& table = select_spline_table();
  const auto body = [&](double* sums, int64_t from, int64_t to) {
    table.forward(a, sums, from, to);
  };
  layout.sum_rows(a.log_det, inverse ? -1.0 : 1.0, 0.0, body, kWork);
  return {y, log_det};
}

static Four spline_map_backward(const MaybeTensor& dy, const MaybeTensor& dlog_det, const Tensor& x,
                                const Tensor& widths, const MaybeTensor& heights,
                                const MaybeTensor& derivatives, const MaybeTensor& order,
                                int64_t begin, int64_t bins, double bound, double min_width,
                                double min_height, double min_derivative, bool inverse,
                                int64_t needs) {
  const Layout layout("spline_map_backward", x);
  SplineArgs a = read_args(layout, x, widths, heights, derivatives, order, begin, bins, bound,
                           min_width, min_height, min_derivative, inverse);
  a.dy = operand(layout, "dy", dy);
  a.dlog_det = row_operand(layout, "dlog_det", dlog_det);
  const auto wanted = [&](int bit, const MaybeTensor& like) {
    return needs >> bit & 1 && like ? allocate_like(layout.op, *like)
                                    : allocate_nothing(layout.op, x);
  };
  const Tensor dx = wanted(0, x);
  const Tensor draw[3] = {wanted(1, widths), wanted(2, heights), wanted(3, derivatives)};
  a.dx = slots_result(a, layout.op, dx, a.columns);
  for (int j = 0; j < 3; ++j) {
    const Tensor& gradient = heights ? draw[j] : draw[0];
    a.draw[j] = result(layout.op, gradient, a.part * a.step[j]);
    if (!heights && a.draw[j].data) {
      const int64_t size = a.draw[j].dtype == DType::f32 ? 4 : 2;
      a.draw[j].data = (char*)a.draw[j].data + j * bins * size;
    }
  }
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    spline_backward_cuda(a, scope.stream());
#endif
    return {dx, draw[0], draw[1], draw[2]};
  }
  const SplineTable& table = select_spline_table();
  layout.parallel([&](int64_t from, int64_t to) { table.backward(a, from, to); }, kWork);
  return {dx, draw[0], draw[1], draw[2]};
}

#define GM_PARAMETERS                                                                         \
  "Tensor x, Tensor widths, Tensor? heights, Tensor? derivatives, Tensor? order, int begin, " \
  "int bins, float bound, float min_width, float min_height, float min_derivative, bool inverse"

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("spline_map_forward(" GM_PARAMETERS ") -> (Tensor, Tensor)");
  m.def("spline_map_backward(Tensor? dy, Tensor? dlog_det, " GM_PARAMETERS
        ", int needs) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("spline_map_forward", TORCH_BOX(&spline_map_forward));
  m.impl("spline_map_backward", TORCH_BOX(&spline_map_backward));
}

}  // namespace gm
