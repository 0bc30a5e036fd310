#include "rotary/rotary.h"

#include <tuple>

#include "common/checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;

static HeadRows heads_of(const Layout& layout, const char* name, const Tensor& x,
                         const Tensor& like) {
  layout.check_device(name, x);
  const DType dtype = float_dtype(layout.op, name, x.scalar_type());
  GM_CHECK(!layout.is_cuda, layout.op, ": has no CUDA C++ kernel; use backend='triton'");
  GM_CHECK(x.dim() == 4, layout.op, ": ", name, " must have shape [B, H, T, D], got ",
           shape_text(x));
  for (int64_t i = 0; i < 4; ++i)
    GM_CHECK(x.size(i) == like.size(i), layout.op, ": ", name, " must have x's shape ",
             shape_text(like), ", got ", shape_text(x));
  GM_CHECK(x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1, layout.op, ": ", name,
           " must be contiguous along its last dimension; call .contiguous()");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), dtype};
}

static HeadSizes sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

// An output like x, which a kernel fills where it has elements.
static Tensor allocate_result(const Layout& layout, const Tensor& x, Result& y) {
  const Tensor made = allocate_like(layout.op, x);
  y = result(layout.op, made, 0);
  y.streaming = false;
  return made;
}

// Runs body over tasks of `elements` each, on the caller's thread if the whole call is small.
template <class Body>
static void run_tasks(int64_t tasks, int64_t elements, const Body& body) {
  const int64_t grain = (1 << 14) / (elements > 0 ? elements : 1) + 1;
  if (tasks <= grain) return body((int64_t)0, tasks);
  torch::stable::parallel_for(0, tasks, grain, body);
}

static const float* read_table(const Layout& layout, const char* name, const Tensor& table) {
  layout.check_device(name, table);
  GM_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Float && table.is_contiguous(),
           layout.op, ": ", name, " must be a contiguous float32 tensor [places, pairs], got ",
           shape_text(table));
  return (const float*)table.data_ptr();
}

static void read_positions(const Layout& layout, const MaybeTensor& positions, int64_t places,
                           RotaryArgs& a) {
  if (!positions) {
    GM_CHECK(a.sizes.tokens <= places, layout.op, ": the table has ", places,
             " places, fewer than the ", a.sizes.tokens, " tokens");
    return;
  }
  const Tensor& p = *positions;
  layout.check_device("positions", p);
  GM_CHECK(p.scalar_type() == ScalarType::Long && p.dim() == 2 && p.is_contiguous() &&
               (p.size(0) == 1 || p.size(0) == a.sizes.batches) && p.size(1) == a.sizes.tokens,
           layout.op, ": positions must be a contiguous int64 tensor [1 or B, T], got ",
           shape_text(p));
  a.position = (const int64_t*)p.data_ptr();
  a.position_stride = p.size(0) == 1 ? 0 : a.sizes.tokens;
  for (int64_t i = 0; i < p.numel(); ++i)
    GM_CHECK(a.position[i] >= 0 && a.position[i] < places, layout.op, ": position ", a.position[i],
             " is outside the table of ", places, " places; make a longer one by rotary_table()");
}

static Tensor turn(const Layout& layout, const Tensor& x, const Tensor& cos, const Tensor& sin,
                   const MaybeTensor& positions, bool interleaved, bool inverse) {
  RotaryArgs a{};
  a.x = heads_of(layout, "x", x, x);
  a.sizes = sizes_of(x);
  a.cos = read_table(layout, "cos", cos);
  a.sin = read_table(layout, "sin", sin);
  a.half = cos.size(1);
  GM_CHECK(sin.size(0) == cos.size(0) && sin.size(1) == a.half && 2 * a.half <= a.sizes.width,
           layout.op, ": cos and sin must have one shape, and at most D / 2 pairs, got ",
           shape_text(cos), " and ", shape_text(sin));
  read_positions(layout, positions, cos.size(0), a);
  a.interleaved = interleaved;
  a.inverse = inverse;
  const Tensor y = allocate_result(layout, x, a.y);
  const RotaryTable& table = select_rotary_table();
  if (a.y.data) {
    run_tasks(a.sizes.batches * a.sizes.tokens, a.sizes.heads * a.sizes.width,
              [&](int64_t begin, int64_t end) { table.rotary_embedding(a, begin, end); });
  }
  return y;
}

static Tensor rotary_embedding_forward(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                       const MaybeTensor& positions, bool interleaved) {
  return turn(Layout("rotary_embedding", x), x, cos, sin, positions, interleaved, false);
}

static Tensor rotary_embedding_backward(const MaybeTensor& dy, const Tensor& x, const Tensor& cos,
                                        const Tensor& sin, const MaybeTensor& positions,
                                        bool interleaved, int64_t needs) {
  const Layout layout("rotary_embedding_backward", x);
  if (!(needs & 1)) return allocate_nothing(layout.op, x);
  GM_CHECK(dy.has_value(), layout.op, ": dy is missing");
  return turn(layout, *dy, cos, sin, positions, interleaved, true);
}

// A weight as contiguous float32, kept alive by `memory`.
static const float* read_weight(const Layout& layout, const MaybeTensor& weight, int64_t width,
                                MaybeTensor& memory) {
  if (!weight) return nullptr;
  layout.check_device("weight", *weight);
  float_dtype(layout.op, "weight", weight->scalar_type());
  GM_CHECK(weight->dim() == 1 && weight->size(0) == width, layout.op, ": weight must have shape (",
           width, "), got ", shape_text(*weight));
  memory = torch::stable::contiguous(torch::stable::to(*weight, ScalarType::Float));
  return (const float*)memory->data_ptr();
}

static RmsNormArgs read_norm(const Layout& layout, const Tensor& x, const MaybeTensor& weight,
                             double eps, MaybeTensor& memory) {
  RmsNormArgs a{};
  a.x = heads_of(layout, "x", x, x);
  a.sizes = sizes_of(x);
  a.weight = read_weight(layout, weight, a.sizes.width, memory);
  a.eps = (float)eps;
  return a;
}

static Tensor rms_norm_forward(const Tensor& x, const MaybeTensor& weight, double eps) {
  const Layout layout("rms_norm", x);
  MaybeTensor memory;
  RmsNormArgs a = read_norm(layout, x, weight, eps, memory);
  const Tensor y = allocate_result(layout, x, a.y);
  const RotaryTable& table = select_rotary_table();
  if (a.y.data) {
    run_tasks(a.sizes.rows(), a.sizes.width,
              [&](int64_t begin, int64_t end) { table.rms_norm(a, begin, end); });
  }
  return y;
}

// Sums of the groups in double, in order.
static void sum_groups(const std::vector<float>& sums, int64_t width, const Tensor& dweight) {
  std::vector<double> total(width);
  for (size_t group = 0; group < sums.size(); group += width)
    for (int64_t i = 0; i < width; ++i) total[i] += sums[group + i];
  for (int64_t i = 0; i < width; ++i) ((float*)dweight.data_ptr())[i] = (float)total[i];
}

static Two rms_norm_backward(const MaybeTensor& dy, const Tensor& x, const MaybeTensor& weight,
                             double eps, int64_t needs) {
  const Layout layout("rms_norm_backward", x);
  GM_CHECK(dy.has_value(), layout.op, ": dy is missing");
  MaybeTensor memory;
  RmsNormArgs a = read_norm(layout, x, weight, eps, memory);
  a.dy = heads_of(layout, "dy", *dy, x);
  const Tensor dx = needs & 1 ? allocate_result(layout, x, a.dx) : allocate_nothing(layout.op, x);
  const bool wants_weight = weight && (needs & 2);
  std::vector<float> sums(wants_weight ? a.sizes.groups() * a.sizes.width : 0);
  if (wants_weight) a.dweight = sums.data();
  const RotaryTable& table = select_rotary_table();
  run_tasks(a.sizes.groups(), kRowGroup * a.sizes.width,
            [&](int64_t begin, int64_t end) { table.rms_norm_backward(a, begin, end); });
  if (!wants_weight) return {dx, allocate_nothing(layout.op, x)};
  const Tensor wide = allocate(layout.op, x, &a.sizes.width, 1, ScalarType::Float);
  sum_groups(sums, a.sizes.width, wide);
  return {dx, torch::stable::to(wide, weight->scalar_type())};
}

#define GM_ROTARY "Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved"

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("rotary_embedding_forward(" GM_ROTARY ") -> Tensor");
  m.def("rotary_embedding_backward(Tensor? dy, " GM_ROTARY ", int needs) -> Tensor");
  m.def("rms_norm_forward(Tensor x, Tensor? weight, float eps) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor? dy, Tensor x, Tensor? weight, float eps, int needs)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("rotary_embedding_forward", TORCH_BOX(&rotary_embedding_forward));
  m.impl("rotary_embedding_backward", TORCH_BOX(&rotary_embedding_backward));
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace gm
