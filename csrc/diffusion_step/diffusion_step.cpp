#include "diffusion_step/diffusion_step.h"

#include <tuple>

#include "common/checks.h"

namespace gm {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The sampler's table and the index of each row. Indices are checked where looking is free.
static StepTable read_steps(const Layout& layout, const Tensor& table, const Tensor& index) {
  layout.check_device("the sampler's table", table);
  layout.check_device("the step index", index);
  GM_CHECK(table.dim() == 2 && table.size(1) == kStepColumns &&
               table.scalar_type() == ScalarType::Float &&
               (table.numel() == 0 || table.stride(1) == 1),
           layout.op, ": table must be float32 [steps, ", kStepColumns, "], got shape ",
           shape_text(table));
  GM_CHECK(
      index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.size(0) == layout.rows,
      layout.op, ": the step index must be int64 (", layout.rows, "), got shape ",
      shape_text(index));
  StepTable steps;
  steps.table = (const float*)table.data_ptr();
  steps.table_rows = table.size(0);
  steps.table_stride = table.stride(0);
  steps.index = (const int64_t*)index.data_ptr();
  steps.index_stride = index.stride(0);
  for (int64_t b = 0; !layout.is_cuda && b < layout.rows; ++b) {
    const int64_t i = steps.index[b * steps.index_stride];
    GM_CHECK(i >= 0 && i < steps.table_rows, layout.op, ": the step must lie in [0, ",
             steps.table_rows, "), the steps of the sampler, got ", i, " in row ", b);
  }
  return steps;
}

static DiffusionStepArgs read_args(const Layout& layout, const Tensor& x, const Tensor& predicted,
                                   const MaybeTensor& unconditional, const MaybeTensor& previous,
                                   const MaybeTensor& variance, const MaybeTensor& eps,
                                   const MaybeTensor& key, const Tensor& table, const Tensor& index,
                                   double guidance, double clip, double ratio) {
  DiffusionStepArgs a;
  a.rows = layout.rows;
  a.columns = layout.columns;
  a.x = operand(layout, "x", x);
  a.predicted = operand(layout, "predicted", predicted);
  a.unconditional = operand(layout, "unconditional", unconditional);
  a.previous = operand(layout, "previous", previous);
  a.variance = operand(layout, "variance", variance);
  a.noisy = eps || key;
  if (a.noisy) read_noise(layout, eps, key, a);
  a.steps = read_steps(layout, table, index);
  a.guidance = (float)guidance;
  a.clip = (float)clip;
  a.ratio = a.clips() ? ratio : 0.0;
  GM_CHECK(ratio >= 0 && ratio <= 1, layout.op, ": ratio must lie in [0, 1], got ", ratio);
  return a;
}

static Three sampler_step_forward(const Tensor& x, const Tensor& predicted,
                                  const MaybeTensor& unconditional, const MaybeTensor& previous,
                                  const MaybeTensor& variance, const MaybeTensor& eps,
                                  const MaybeTensor& key, const Tensor& table, const Tensor& index,
                                  double guidance, double clip, double ratio, bool denoised, bool) {
  const Layout layout("sampler_step", x);
  DiffusionStepArgs a = read_args(layout, x, predicted, unconditional, previous, variance, eps, key,
                                  table, index, guidance, clip, ratio);
  const Tensor x_next = allocate_like(layout.op, x);
  const Tensor x0c = Wanted{layout, denoised}(0, x, x, a.denoised);
  const int64_t thresholds = ratio > 0 ? layout.rows : 0;
  const Tensor h = allocate(layout.op, x, &thresholds, 1, ScalarType::Float);
  a.x_next = result(layout.op, x_next, layout.columns);
  a.h = (float*)h.data_ptr();
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    diffusion_step_cuda(a, scope.stream());
#endif
    return {x_next, x0c, h};
  }
  const DiffusionStepTable& kernels = select_diffusion_step_table();
  if (a.ratio > 0) {
    torch::stable::parallel_for(
        0, layout.rows, 1, [&](int64_t begin, int64_t end) { kernels.threshold(a, begin, end); });
  }
  layout.parallel([&](int64_t begin, int64_t end) { kernels.forward(a, begin, end); });
  return {x_next, x0c, h};
}

static Six sampler_step_backward(const MaybeTensor& dx_next, const MaybeTensor& ddenoised,
                                 const Tensor& threshold, const Tensor& x, const Tensor& predicted,
                                 const MaybeTensor& unconditional, const MaybeTensor& previous,
                                 const MaybeTensor& variance, const MaybeTensor& eps,
                                 const MaybeTensor& key, const Tensor& table, const Tensor& index,
                                 double guidance, double clip, double ratio, bool denoised,
                                 int64_t needs) {
  const Layout layout("sampler_step_backward", x);
  DiffusionStepArgs a = read_args(layout, x, predicted, unconditional, previous, variance, eps, key,
                                  table, index, guidance, clip, ratio);
  a.dx_next = operand(layout, "dx_next", dx_next);
  if (denoised) a.ddenoised = operand(layout, "ddenoised", ddenoised);
  if (a.ratio > 0) {
    layout.check_device("threshold", threshold);
    GM_CHECK(threshold.scalar_type() == ScalarType::Float && threshold.is_contiguous() &&
                 threshold.numel() == layout.rows,
             layout.op, ": threshold must be contiguous float32 (", layout.rows, "), got shape ",
             shape_text(threshold));
    a.h = (float*)threshold.data_ptr();
  }
  const Wanted wanted{layout, needs};
  const Tensor dx = wanted(0, x, x, a.dx), dpredicted = wanted(1, predicted, x, a.dpredicted);
  const Tensor dunconditional = wanted(2, unconditional, x, a.dunconditional);
  const Tensor dprevious = wanted(3, previous, x, a.dprevious);
  const Tensor dvariance = wanted(4, variance, x, a.dvariance), deps = wanted(5, eps, x, a.deps);
  GM_CHECK(!a.dvariance.data || a.noisy, layout.op, ": a variance needs noise");
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    diffusion_step_backward_cuda(a, scope.stream());
#endif
  } else {
    const DiffusionStepTable& kernels = select_diffusion_step_table();
    layout.parallel([&](int64_t begin, int64_t end) { kernels.backward(a, begin, end); });
  }
  return {dx, dpredicted, dunconditional, dprevious, dvariance, deps};
}

#define GM_PARAMETERS                                                                \
  "Tensor x, Tensor predicted, Tensor? unconditional, Tensor? previous, Tensor? "    \
  "variance, Tensor? eps, Tensor? key, Tensor table, Tensor index, float guidance, " \
  "float clip, float ratio, bool denoised"

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("sampler_step_forward(" GM_PARAMETERS ", bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("sampler_step_backward(Tensor? dx_next, Tensor? ddenoised, Tensor threshold, " GM_PARAMETERS
        ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("sampler_step_forward", TORCH_BOX(&sampler_step_forward));
  m.impl("sampler_step_backward", TORCH_BOX(&sampler_step_backward));
}

}  // namespace gm
