#include "gaussian/gaussian.h"

#include <limits>
#include <memory>
#include <tuple>

#include "common/checks.h"

namespace gm {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operands that every op of the family shares.
static GaussianArgs read_args(const Layout& layout, const Tensor& mean, const Tensor& logvar,
                              const MaybeTensor& prior_mean, const MaybeTensor& prior_logvar,
                              double low, double high) {
  GaussianArgs a;
  a.mean = operand(layout, "mean", mean);
  a.logvar = operand(layout, "logvar", logvar);
  a.prior_mean = operand(layout, "prior_mean", prior_mean);
  a.prior_logvar = operand(layout, "prior_logvar", prior_logvar);
  a.low = (float)low;
  a.high = (float)high;
  a.rows = layout.rows;
  a.columns = layout.columns;
  return a;
}

static void run_forward(const Layout& layout, const Tensor& mean, GaussianArgs& a) {
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    const int64_t sizes[2] = {layout.rows, chunks_of(layout.columns)};
    MaybeTensor partial;  // freed after the launch: the allocator reuses it in stream order
    if (sizes[1] > 1) {
      partial = allocate(layout.op, mean, sizes, 2, ScalarType::Float);
      a.partial = (float*)partial->data_ptr();
    }
    gaussian_forward_cuda(a, scope.stream());
#endif
    return;
  }
  const GaussianTable& table = select_gaussian_table();
  layout.sum_rows(a.kl, 0.5, 0.0, [&](double* sums, int64_t begin, int64_t end) {
    table.forward(a, sums, begin, end);
  });
}

static Two reparameterize_kl_forward(const Tensor& mean, const Tensor& logvar,
                                     const MaybeTensor& prior_mean, const MaybeTensor& prior_logvar,
                                     const MaybeTensor& eps, const MaybeTensor& key, double low,
                                     double high) {
  const Layout layout("reparameterize_kl", mean);
  GaussianArgs a = read_args(layout, mean, logvar, prior_mean, prior_logvar, low, high);
  read_noise(layout, eps, key, a);
  const Tensor z = allocate_like(layout.op, mean), kl = allocate_rows(layout, mean);
  a.z = result(layout.op, z, layout.columns);
  a.kl = (float*)kl.data_ptr();
  run_forward(layout, mean, a);
  return {z, kl};
}

static Tensor gaussian_kl_forward(const Tensor& mean, const Tensor& logvar,
                                  const MaybeTensor& prior_mean, const MaybeTensor& prior_logvar,
                                  double low, double high) {
  const Layout layout("gaussian_kl", mean);
  GaussianArgs a = read_args(layout, mean, logvar, prior_mean, prior_logvar, low, high);
  const Tensor kl = allocate_rows(layout, mean);
  a.kl = (float*)kl.data_ptr();
  run_forward(layout, mean, a);
  return kl;
}

static Tensor gaussian_kl_per_dim_forward(const Tensor& mean, const Tensor& logvar,
                                          const MaybeTensor& prior_mean,
                                          const MaybeTensor& prior_logvar, double low,
                                          double high) {
  const Layout layout("gaussian_kl_per_dim", mean);
  GM_CHECK(!layout.is_cuda, layout.op, ": has no CUDA C++ kernel; use backend='triton'");
  const GaussianArgs a = read_args(layout, mean, logvar, prior_mean, prior_logvar, low, high);
  const auto sizes = mean.sizes();
  const Tensor kl =
      allocate(layout.op, mean, sizes.data() + 1, (int64_t)sizes.size() - 1, ScalarType::Float);
  const int64_t slabs = (layout.rows + kSlab - 1) / kSlab, columns = layout.columns;
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  std::unique_ptr<double[]> partial(new double[slabs * columns]);
  const GaussianTable& table = select_gaussian_table();
  const auto body = [&](int64_t begin, int64_t end) {
    table.per_dim(a, partial.get(), begin, end);
  };
  if (slabs * blocks == 1) {
    body(0, 1);
  } else {
    torch::stable::parallel_for(0, slabs * blocks, 1, body);
  }
  float* out = (float*)kl.data_ptr();
  const double scale = 0.5 / (double)layout.rows;  // no rows: 0 / 0, a mean over nothing
  for (int64_t d = 0; d < columns; ++d) {
    double sum = 0.0;
    for (int64_t s = 0; s < slabs; ++s) sum += partial[s * columns + d];
    out[d] = (float)(sum * scale);
  }
  return kl;
}

static void run_backward(const Layout& layout, const GaussianArgs& a) {
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    gaussian_backward_cuda(a, scope.stream());
#endif
    return;
  }
  const GaussianTable& table = select_gaussian_table();
  layout.parallel([&](int64_t begin, int64_t end) { table.backward(a, begin, end); });
}

static Five reparameterize_kl_backward(const MaybeTensor& dz, const MaybeTensor& dkl,
                                       const Tensor& mean, const Tensor& logvar,
                                       const MaybeTensor& prior_mean,
                                       const MaybeTensor& prior_logvar, const MaybeTensor& eps,
                                       const MaybeTensor& key, double low, double high,
                                       int64_t needs) {
  const Layout layout("reparameterize_kl_backward", mean);
  GaussianArgs a = read_args(layout, mean, logvar, prior_mean, prior_logvar, low, high);
  read_noise(layout, eps, key, a);
  a.dz = operand(layout, "dz", dz);
  a.dkl = row_operand(layout, "dkl", dkl);
  const Wanted wanted{layout, needs};
  const Tensor dmean = wanted(0, mean, mean, a.dmean), dlogvar = wanted(1, logvar, mean, a.dlogvar);
  const Tensor dprior_mean = wanted(2, prior_mean, mean, a.dprior_mean);
  const Tensor dprior_logvar = wanted(3, prior_logvar, mean, a.dprior_logvar);
  const Tensor deps = wanted(4, eps, mean, a.deps);
  run_backward(layout, a);
  return {dmean, dlogvar, dprior_mean, dprior_logvar, deps};
}

static Four kl_backward(const Layout& layout, GaussianArgs& a, const Tensor& mean,
                        const Tensor& logvar, const MaybeTensor& prior_mean,
                        const MaybeTensor& prior_logvar, int64_t needs) {
  const Wanted wanted{layout, needs};
  const Tensor dmean = wanted(0, mean, mean, a.dmean), dlogvar = wanted(1, logvar, mean, a.dlogvar);
  const Tensor dprior_mean = wanted(2, prior_mean, mean, a.dprior_mean);
  const Tensor dprior_logvar = wanted(3, prior_logvar, mean, a.dprior_logvar);
  run_backward(layout, a);
  return {dmean, dlogvar, dprior_mean, dprior_logvar};
}

static Four gaussian_kl_backward(const Tensor& dkl, const Tensor& mean, const Tensor& logvar,
                                 const MaybeTensor& prior_mean, const MaybeTensor& prior_logvar,
                                 double low, double high, int64_t needs) {
  const Layout layout("gaussian_kl_backward", mean);
  GaussianArgs a = read_args(layout, mean, logvar, prior_mean, prior_logvar, low, high);
  a.dkl = row_operand(layout, "dkl", dkl);
  return kl_backward(layout, a, mean, logvar, prior_mean, prior_logvar, needs);
}

static Four gaussian_kl_per_dim_backward(const Tensor& dkl, const Tensor& mean,
                                         const Tensor& logvar, const MaybeTensor& prior_mean,
                                         const MaybeTensor& prior_logvar, double low, double high,
                                         int64_t needs) {
  const Layout layout("gaussian_kl_per_dim_backward", mean);
  GaussianArgs a = read_args(layout, mean, logvar, prior_mean, prior_logvar, low, high);
  layout.check_device("dkl", dkl);
  GM_CHECK(dkl.numel() == layout.columns, layout.op, ": dkl must hold ", layout.columns,
           " values, got shape ", shape_text(dkl));
  const Tensor row = torch::stable::contiguous(dkl);
  a.dkl = {row.data_ptr(), 0, 1, float_dtype(layout.op, "dkl", row.scalar_type())};
  a.dkl_scale = 1.0f / (float)layout.rows;
  return kl_backward(layout, a, mean, logvar, prior_mean, prior_logvar, needs);
}

#define GM_PARAMETERS "Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar"

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("reparameterize_kl_forward(" GM_PARAMETERS
        ", Tensor? eps, Tensor? key, float low, float high) -> (Tensor, Tensor)");
  m.def("reparameterize_kl_backward(Tensor? dz, Tensor? dkl, " GM_PARAMETERS
        ", Tensor? eps, Tensor? key, float low, float high, int needs)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gaussian_kl_forward(" GM_PARAMETERS ", float low, float high) -> Tensor");
  m.def("gaussian_kl_backward(Tensor dkl, " GM_PARAMETERS
        ", float low, float high, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gaussian_kl_per_dim_forward(" GM_PARAMETERS ", float low, float high) -> Tensor");
  m.def("gaussian_kl_per_dim_backward(Tensor dkl, " GM_PARAMETERS
        ", float low, float high, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("reparameterize_kl_forward", TORCH_BOX(&reparameterize_kl_forward));
  m.impl("reparameterize_kl_backward", TORCH_BOX(&reparameterize_kl_backward));
  m.impl("gaussian_kl_forward", TORCH_BOX(&gaussian_kl_forward));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
  m.impl("gaussian_kl_per_dim_forward", TORCH_BOX(&gaussian_kl_per_dim_forward));
  m.impl("gaussian_kl_per_dim_backward", TORCH_BOX(&gaussian_kl_per_dim_backward));
}

}  // namespace gm
