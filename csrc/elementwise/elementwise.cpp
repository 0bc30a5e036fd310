#include "elementwise/elementwise.h"

#include <cmath>
#include <tuple>

#include "common/checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

static void check_cpu(const Layout& layout) {
  GM_CHECK(!layout.is_cuda, layout.op, ": has no CUDA C++ kernel; use backend='triton'");
}

static std::vector<float> read_vector(const Layout& layout, const char* name, const Tensor& x,
                                      int64_t size) {
  layout.check_device(name, x);
  float_dtype(layout.op, name, x.scalar_type());
  GM_CHECK(x.dim() == 1 && x.size(0) == size, layout.op, ": ", name, " must have shape (", size,
           "), got ", shape_text(x));
  const Tensor wide = torch::stable::to(x, ScalarType::Float);
  const float* data = (const float*)wide.data_ptr();
  std::vector<float> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = data[i * wide.stride(0)];
  return values;
}

// The parameters of a call by channel, and spread over the columns of a row.
struct Parameters {
  int64_t channels, pixels;
  std::vector<float> shift, scale, log_scale;
  std::vector<float> shifts, scales;  // [columns]

  Parameters(const Layout& layout, const Tensor& x, const Tensor& shift_of, const Tensor& l,
             bool inverse) {
    GM_CHECK(x.dim() >= 2, layout.op, ": x must have shape [B, C, *], got ", shape_text(x));
    channels = x.size(1);
    pixels = 1;
    for (int64_t i = 2; i < x.dim(); ++i) pixels *= x.size(i);
    shift = read_vector(layout, "shift", shift_of, channels);
    log_scale = read_vector(layout, "log_scale", l, channels);
    for (const float v : log_scale) scale.push_back((float)std::exp(inverse ? -(double)v : v));
    for (int64_t c = 0; c < channels; ++c) {
      shifts.insert(shifts.end(), pixels, shift[c]);
      scales.insert(scales.end(), pixels, scale[c]);
    }
  }

  ActnormArgs args(const Layout& layout, const Tensor& x, bool inverse) const {
    ActnormArgs a{};
    a.x = operand(layout, "x", x);
    a.shift = shifts.data();
    a.scale = scales.data();
    a.rows = layout.rows;
    a.columns = layout.columns;
    a.inverse = inverse;
    return a;
  }
};

template <class Body>
static void run(const ActnormArgs& a, const Body& body) {
  const int64_t grain = (1 << 14) / (kGroup * (a.columns < kWidth ? a.columns + 16 : kWidth)) + 1;
  if (a.tasks() <= grain) return body((int64_t)0, a.tasks());
  torch::stable::parallel_for(0, a.tasks(), grain, body);
}

static Two actnorm_forward(const Tensor& x, const Tensor& shift, const Tensor& log_scale,
                           bool inverse) {
  const Layout layout("actnorm", x);
  check_cpu(layout);
  const Parameters p(layout, x, shift, log_scale, inverse);
  ActnormArgs a = p.args(layout, x, inverse);
  const Tensor y = allocate_like(layout.op, x), log_det = allocate_rows(layout, x);
  a.y = result(layout.op, y, layout.columns);
  double sum = 0.0;
  for (const float l : p.log_scale) sum += l;
  const float value = (float)(sum * (double)p.pixels * (inverse ? -1.0 : 1.0));
  for (int64_t b = 0; b < layout.rows; ++b) ((float*)log_det.data_ptr())[b] = value;
  const ElementwiseTable& table = select_elementwise_table();
  run(a, [&](int64_t begin, int64_t end) { table.actnorm(a, begin, end); });
  return {y, log_det};
}

// sums [groups, columns] to one sum a channel: over the groups first, then over the pixels.
static std::vector<double> sum_channels(const std::vector<float>& sums, const Parameters& p) {
  const int64_t columns = p.channels * p.pixels;
  std::vector<double> by_column(columns), by_channel(p.channels);
  for (size_t at = 0; at < sums.size(); at += columns)
    for (int64_t d = 0; d < columns; ++d) by_column[d] += sums[at + d];
  for (int64_t d = 0; d < columns; ++d) by_channel[d / p.pixels] += by_column[d];
  return by_channel;
}

static double sum_of(const Layout& layout, const MaybeTensor& dlog_det) {
  if (!dlog_det) return 0.0;
  double sum = 0.0;
  for (const float l : read_vector(layout, "dlog_det", *dlog_det, layout.rows)) sum += l;
  return sum;
}

// A gradient [C] in its parameter's dtype.
static Tensor to_gradient(const char* op, const std::vector<double>& values, const Tensor& like) {
  const int64_t size = (int64_t)values.size();
  const Tensor wide = allocate(op, like, &size, 1, ScalarType::Float);
  for (int64_t c = 0; c < size; ++c) ((float*)wide.data_ptr())[c] = (float)values[c];
  return torch::stable::to(wide, like.scalar_type());
}

static Three actnorm_backward(const MaybeTensor& dy, const MaybeTensor& dlog_det, const Tensor& x,
                              const Tensor& shift, const Tensor& log_scale, bool inverse,
                              int64_t needs) {
  const Layout layout("actnorm_backward", x);
  check_cpu(layout);
  const Parameters p(layout, x, shift, log_scale, inverse);
  ActnormArgs a = p.args(layout, x, inverse);
  a.dy = operand(layout, "dy", dy);
  const Wanted wanted{layout, needs};
  const Tensor dx = wanted(0, x, x, a.dx);
  const size_t size = needs & 6 ? a.groups() * a.columns : 0;
  std::vector<float> sum_g(size), sum_gx(size);
  if (needs & 6) {
    a.sum_g = sum_g.data();
    a.sum_gx = sum_gx.data();
  }
  const ElementwiseTable& table = select_elementwise_table();
  run(a, [&](int64_t begin, int64_t end) { table.actnorm_backward(a, begin, end); });
  Tensor dshift = allocate_nothing(layout.op, x), dlog_scale = allocate_nothing(layout.op, x);
  if (needs & 2) {
    std::vector<double> sums = sum_channels(sum_g, p);
    for (int64_t c = 0; c < p.channels; ++c) sums[c] *= inverse ? -1.0 : p.scale[c];
    dshift = to_gradient(layout.op, sums, shift);
  }
  if (needs & 4) {
    std::vector<double> sums = sum_channels(sum_gx, p);
    const double of_log_det = sum_of(layout, dlog_det) * (double)p.pixels;
    for (int64_t c = 0; c < p.channels; ++c) {
      sums[c] = (sums[c] * p.scale[c] + of_log_det) * (inverse ? -1.0 : 1.0);
    }
    dlog_scale = to_gradient(layout.op, sums, log_scale);
  }
  return {dx, dshift, dlog_scale};
}

static PointwiseArgs read_pointwise(const Layout& layout, const Tensor& x, int64_t kind,
                                    double parameter, bool inverse) {
  check_cpu(layout);
  GM_CHECK(kind == 0 || kind == 1, layout.op, ": kind must be 0 or 1, got ", kind);
  PointwiseArgs a{};
  a.x = operand(layout, "x", x);
  a.columns = layout.columns;
  a.kind = (Kind)kind;
  a.inverse = inverse;
  const double m = 1.0 - 2.0 * parameter;
  a.parameter = (float)(a.kind == Kind::leaky && inverse ? 1.0 / parameter : parameter);
  a.m = (float)(inverse ? 1.0 / m : m);
  return a;
}

static Two pointwise_forward(const Tensor& x, int64_t kind, double parameter, bool inverse) {
  const Layout layout("pointwise", x);
  PointwiseArgs a = read_pointwise(layout, x, kind, parameter, inverse);
  const Tensor y = allocate_like(layout.op, x), log_det = allocate_rows(layout, x);
  a.y = result(layout.op, y, layout.columns);
  const bool is_leaky = a.kind == Kind::leaky;
  const double sign = inverse ? -1.0 : 1.0;
  const double weight = is_leaky ? sign * std::log(parameter) : 1.0;
  const double bias =
      is_leaky ? 0.0 : sign * std::log(1.0 - 2.0 * parameter) * (double)layout.columns;
  const ElementwiseTable& table = select_elementwise_table();
  layout.sum_rows(
      (float*)log_det.data_ptr(), weight, bias,
      [&](double* sums, int64_t begin, int64_t end) { table.pointwise(a, sums, begin, end); });
  return {y, log_det};
}

static Tensor pointwise_backward(const MaybeTensor& dy, const MaybeTensor& dlog_det,
                                 const Tensor& x, int64_t kind, double parameter, bool inverse,
                                 int64_t needs) {
  const Layout layout("pointwise_backward", x);
  PointwiseArgs a = read_pointwise(layout, x, kind, parameter, inverse);
  a.dy = operand(layout, "dy", dy);
  a.dlog_det = row_operand(layout, "dlog_det", dlog_det);
  const Tensor dx = Wanted{layout, needs}(0, x, x, a.dx);
  if (!a.dx.data) return dx;
  const ElementwiseTable& table = select_elementwise_table();
  layout.parallel([&](int64_t begin, int64_t end) { table.pointwise_backward(a, begin, end); });
  return dx;
}

static Tensor dequantize(const Tensor& levels, const MaybeTensor& u, const MaybeTensor& key,
                         int64_t bins) {
  const Layout layout("dequantize", levels);
  check_cpu(layout);
  const ScalarType dtype = levels.scalar_type();
  GM_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Byte,
           layout.op, ": levels must be int64, int32 or uint8");
  GM_CHECK(levels.is_contiguous(), layout.op, ": levels must be contiguous");
  GM_CHECK(u.has_value() != key.has_value(), layout.op, ": give exactly one of u and key");
  DequantizeArgs a{};
  a.levels = levels.data_ptr();
  a.dtype = dtype == ScalarType::Long  ? DType::i64
            : dtype == ScalarType::Int ? DType::i32
                                       : DType::u8;
  if (u) {
    layout.check_device("u", *u);
    GM_CHECK(
        u->scalar_type() == ScalarType::Float && u->is_contiguous() && u->numel() == levels.numel(),
        layout.op, ": u must be contiguous float32 of levels' shape");
    a.u = (const float*)u->data_ptr();
  } else {
    const Key k = read_key(layout.op, *key, 0);
    GM_CHECK(!k.device, layout.op, ": the key must be on the CPU for CPU tensors");
    a.key = k.host;
  }
  const double margin = 0x1p-22;
  a.columns = layout.columns;
  a.factor = (float)(1.0 / (double)bins);
  a.low = (float)((1.0 + margin) / (double)bins);
  a.high = (float)((1.0 - margin) / (double)bins);
  const auto sizes = levels.sizes();
  const Tensor x =
      allocate(layout.op, levels, sizes.data(), (int64_t)sizes.size(), ScalarType::Float);
  a.x = result(layout.op, x, layout.columns);
  const ElementwiseTable& table = select_elementwise_table();
  if (a.x.data) {
    layout.parallel([&](int64_t begin, int64_t end) { table.dequantize(a, begin, end); });
  }
  return x;
}

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def(
      "actnorm_forward(Tensor x, Tensor shift, Tensor log_scale, bool inverse)"
      " -> (Tensor, Tensor)");
  m.def(
      "actnorm_backward(Tensor? dy, Tensor? dlog_det, Tensor x, Tensor shift, Tensor log_scale, "
      "bool inverse, int needs) -> (Tensor, Tensor, Tensor)");
  m.def(
      "pointwise_forward(Tensor x, int kind, float parameter, bool inverse)"
      " -> (Tensor, Tensor)");
  m.def(
      "pointwise_backward(Tensor? dy, Tensor? dlog_det, Tensor x, int kind, float parameter, "
      "bool inverse, int needs) -> Tensor");
  m.def("dequantize(Tensor levels, Tensor? u, Tensor? key, int bins) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("actnorm_forward", TORCH_BOX(&actnorm_forward));
  m.impl("actnorm_backward", TORCH_BOX(&actnorm_backward));
  m.impl("pointwise_forward", TORCH_BOX(&pointwise_forward));
  m.impl("pointwise_backward", TORCH_BOX(&pointwise_backward));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace gm
