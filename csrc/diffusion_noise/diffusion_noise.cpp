#include "diffusion_noise/diffusion_noise.h"

#include <tuple>

#include "common/checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// The table of levels and the times that gather from it. Times are checked where looking is free.
static Levels read_levels_of(const Layout& layout, const Tensor& table, const MaybeTensor& t) {
  layout.check_device("the schedule's table", table);
  GM_CHECK(table.dim() == 2 && table.size(1) == 3 && table.scalar_type() == ScalarType::Float &&
               (table.numel() == 0 || table.stride(1) == 1),
           layout.op, ": table must be float32 [T, 3], got shape ", shape_text(table));
  Levels levels;
  levels.table = (const float*)table.data_ptr();
  levels.table_rows = table.size(0);
  levels.table_stride = table.stride(0);
  if (!t) {
    GM_CHECK(table.size(0) == layout.rows, layout.op, ": without t the table must have one row for",
             " each of the ", layout.rows, " rows, got shape ", shape_text(table));
    return levels;
  }
  layout.check_device("t", *t);
  GM_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1 && t->size(0) == layout.rows,
           layout.op, ": t must be int64 (", layout.rows, "), got shape ", shape_text(*t));
  levels.t = (const int64_t*)t->data_ptr();
  levels.t_stride = t->stride(0);
  for (int64_t b = 0; !layout.is_cuda && b < layout.rows; ++b) {
    const int64_t at = levels.t[b * levels.t_stride];
    GM_CHECK(at >= 0 && at < levels.table_rows, layout.op, ": t must lie in [0, ",
             levels.table_rows, "), the times of the schedule, got ", at, " in row ", b);
  }
  return levels;
}

static DiffusionNoiseArgs read_args(const Layout& layout, const Tensor& x0, const MaybeTensor& eps,
                                    const MaybeTensor& key, const Tensor& table,
                                    const MaybeTensor& t, int64_t prediction) {
  GM_CHECK(prediction >= 0 && prediction < 4, layout.op, ": prediction must be 0 to 3, got ",
           prediction);
  DiffusionNoiseArgs a;
  a.rows = layout.rows;
  a.columns = layout.columns;
  a.prediction = (Prediction)prediction;
  a.x0 = operand(layout, "x0", x0);
  a.levels = read_levels_of(layout, table, t);
  read_noise(layout, eps, key, a);
  return a;
}

static void run_noise(const Layout& layout, const DiffusionNoiseArgs& a) {
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    diffusion_noise_cuda(a, scope.stream());
#endif
    return;
  }
  const DiffusionNoiseTable& table = select_diffusion_noise_table();
  layout.parallel([&](int64_t begin, int64_t end) { table.noise(a, begin, end); });
}

static Tensor add_noise_forward(const Tensor& x0, const MaybeTensor& eps, const MaybeTensor& key,
                                const Tensor& table, const MaybeTensor& t) {
  const Layout layout("add_noise", x0);
  DiffusionNoiseArgs a = read_args(layout, x0, eps, key, table, t, 0);
  const Tensor x_t = allocate_like(layout.op, x0);
  a.x_t = result(layout.op, x_t, layout.columns);
  run_noise(layout, a);
  return x_t;
}

static Two add_noise_with_target_forward(const Tensor& x0, const MaybeTensor& eps,
                                         const MaybeTensor& key, const Tensor& table,
                                         const MaybeTensor& t, int64_t prediction) {
  const Layout layout("add_noise_with_target", x0);
  DiffusionNoiseArgs a = read_args(layout, x0, eps, key, table, t, prediction);
  const Tensor x_t = allocate_like(layout.op, x0), target = allocate_like(layout.op, x0);
  a.x_t = result(layout.op, x_t, layout.columns);
  a.target = result(layout.op, target, layout.columns);
  run_noise(layout, a);
  return {x_t, target};
}

static Two noise_backward(const Layout& layout, const MaybeTensor& dx_t, const MaybeTensor& dtarget,
                          const Tensor& x0, const MaybeTensor& eps, const MaybeTensor& key,
                          const Tensor& table, const MaybeTensor& t, int64_t prediction,
                          int64_t needs) {
  DiffusionNoiseArgs a = read_args(layout, x0, eps, key, table, t, prediction);
  a.dx_t = operand(layout, "dx_t", dx_t);
  a.dtarget = operand(layout, "dtarget", dtarget);
  GM_CHECK(dx_t || dtarget, layout.op, ": give dx_t or dtarget");
  const Wanted wanted{layout, needs};
  const Tensor dx0 = wanted(0, x0, x0, a.dx0), deps = wanted(1, eps, x0, a.deps);
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    diffusion_noise_backward_cuda(a, scope.stream());
#endif
  } else {
    const DiffusionNoiseTable& kernels = select_diffusion_noise_table();
    layout.parallel([&](int64_t begin, int64_t end) { kernels.noise_backward(a, begin, end); });
  }
  return {dx0, deps};
}

static Two add_noise_backward(const Tensor& dx_t, const Tensor& x0, const MaybeTensor& eps,
                              const MaybeTensor& key, const Tensor& table, const MaybeTensor& t,
                              int64_t needs) {
  const Layout layout("add_noise_backward", x0);
  return noise_backward(layout, dx_t, std::nullopt, x0, eps, key, table, t, 0, needs);
}

static Two add_noise_with_target_backward(const MaybeTensor& dx_t, const MaybeTensor& dtarget,
                                          const Tensor& x0, const MaybeTensor& eps,
                                          const MaybeTensor& key, const Tensor& table,
                                          const MaybeTensor& t, int64_t prediction, int64_t needs) {
  const Layout layout("add_noise_with_target_backward", x0);
  return noise_backward(layout, dx_t, dtarget, x0, eps, key, table, t, prediction, needs);
}

static Two denoising_loss_forward(const Tensor& predicted, const Tensor& x0, const MaybeTensor& eps,
                                  const MaybeTensor& key, const Tensor& table, const MaybeTensor& t,
                                  int64_t prediction, bool keep) {
  const Layout layout("denoising_loss", predicted);
  DiffusionNoiseArgs a = read_args(layout, x0, eps, key, table, t, prediction);
  a.predicted = operand(layout, "predicted", predicted);
  const Tensor loss = allocate_rows(layout, predicted);
  const Tensor residual = Wanted{layout, keep}(0, predicted, predicted, a.residual);
  a.loss = (float*)loss.data_ptr();
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    const int64_t sizes[2] = {layout.rows, chunks_of(layout.columns)};
    MaybeTensor partial;  // freed after the launch: the allocator reuses it in stream order
    if (sizes[1] > 1) {
      partial = allocate(layout.op, predicted, sizes, 2, ScalarType::Float);
      a.partial = (float*)partial->data_ptr();
    }
    denoising_loss_cuda(a, scope.stream());
#endif
    return {loss, residual};
  }
  const DiffusionNoiseTable& kernels = select_diffusion_noise_table();
  layout.sum_rows(
      a.loss, 1.0 / (double)layout.columns, 0.0,
      [&](double* sums, int64_t begin, int64_t end) { kernels.loss(a, sums, begin, end); });
  for (int64_t b = 0; b < layout.rows; ++b) {
    const int64_t index = a.levels.t ? a.levels.t[b * a.levels.t_stride] : b;
    a.loss[b] *= a.levels.table[index * a.levels.table_stride + 2];
  }
  return {loss, residual};
}

static Three denoising_loss_backward(const Tensor& dloss, const Tensor& residual,
                                     const Tensor& predicted, const Tensor& x0,
                                     const MaybeTensor& eps, const MaybeTensor& key,
                                     const Tensor& table, const MaybeTensor& t, int64_t prediction,
                                     int64_t needs) {
  const Layout layout("denoising_loss_backward", predicted);
  DiffusionNoiseArgs a = read_args(layout, x0, eps, key, table, t, prediction);
  a.dloss = row_operand(layout, "dloss", dloss);
  a.kept = operand(layout, "residual", residual);
  const Wanted wanted{layout, needs};
  const Tensor dpredicted = wanted(0, predicted, predicted, a.dpredicted);
  const Tensor dx0 = wanted(1, x0, predicted, a.dx0), deps = wanted(2, eps, predicted, a.deps);
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    denoising_loss_backward_cuda(a, scope.stream());
#endif
  } else {
    const DiffusionNoiseTable& kernels = select_diffusion_noise_table();
    layout.parallel([&](int64_t begin, int64_t end) { kernels.loss_backward(a, begin, end); });
  }
  return {dpredicted, dx0, deps};
}

#define GM_PARAMETERS "Tensor x0, Tensor? eps, Tensor? key, Tensor table, Tensor? t"

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("add_noise_forward(" GM_PARAMETERS ") -> Tensor");
  m.def("add_noise_backward(Tensor dx_t, " GM_PARAMETERS ", int needs) -> (Tensor, Tensor)");
  m.def("add_noise_with_target_forward(" GM_PARAMETERS ", int prediction) -> (Tensor, Tensor)");
  m.def("add_noise_with_target_backward(Tensor? dx_t, Tensor? dtarget, " GM_PARAMETERS
        ", int prediction, int needs) -> (Tensor, Tensor)");
  m.def("denoising_loss_forward(Tensor predicted, " GM_PARAMETERS
        ", int prediction, bool keep) -> (Tensor, Tensor)");
  m.def("denoising_loss_backward(Tensor dloss, Tensor residual, Tensor predicted, " GM_PARAMETERS
        ", int prediction, int needs) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("add_noise_forward", TORCH_BOX(&add_noise_forward));
  m.impl("add_noise_backward", TORCH_BOX(&add_noise_backward));
  m.impl("add_noise_with_target_forward", TORCH_BOX(&add_noise_with_target_forward));
  m.impl("add_noise_with_target_backward", TORCH_BOX(&add_noise_with_target_backward));
  m.impl("denoising_loss_forward", TORCH_BOX(&denoising_loss_forward));
  m.impl("denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
}

}  // namespace gm
