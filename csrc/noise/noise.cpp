#include "noise/noise.h"

#include "common/checks.h"

namespace gm {

static Tensor fill(const char* op, Distribution distribution, const Tensor& key, int64_t rows,
                   int64_t columns, int64_t stream, ScalarType dtype,
                   torch::stable::Device device) {
  GM_CHECK(rows >= 0 && columns >= 0, op, ": rows and columns must be >= 0, got ", rows, " and ",
           columns);
  const Key k = read_key(op, key, stream);
  const DType out_dtype = float_dtype(op, "dtype", dtype);
  const int64_t sizes[2] = {rows, columns};
  const Tensor out = allocate_on(op, (int32_t)device.type(), device.index(), sizes, 2, dtype);
  const Layout layout(op, out);
  if (k.device) layout.check_device("key", key);
  if (out.numel() == 0) return out;
  const Result result{out.data_ptr(), columns, out_dtype};
  if (layout.is_cuda) {
#if defined(GM_CUDA)
    CudaScope scope(layout.device);
    noise_fill_cuda(distribution, k.host, k.device, result, rows, columns, scope.stream());
#endif
    return out;
  }
  const NoiseTable& table = select_noise_table();
  layout.parallel([&](int64_t begin, int64_t end) {
    table.fill(distribution, k.host, result, columns, begin, end);
  });
  return out;
}

static Tensor normal(const Tensor& key, int64_t rows, int64_t columns, int64_t stream,
                     ScalarType dtype, torch::stable::Device device) {
  return fill("normal", Distribution::normal, key, rows, columns, stream, dtype, device);
}

static Tensor uniform(const Tensor& key, int64_t rows, int64_t columns, int64_t stream,
                      ScalarType dtype, torch::stable::Device device) {
  return fill("uniform", Distribution::uniform, key, rows, columns, stream, dtype, device);
}

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def(
      "normal(Tensor key, SymInt rows, SymInt columns, int stream, ScalarType dtype, Device device)"
      " -> Tensor");
  m.def(
      "uniform(Tensor key, SymInt rows, SymInt columns, int stream, ScalarType dtype, Device "
      "device)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("uniform", TORCH_BOX(&uniform));
}

}  // namespace gm
