// The torch side of every <family>.cpp: memory-safety checks, allocation, keys, threads and
// streams. Built on PyTorch's stable ABI alone. Messages for people live in Python; these guard
// direct calls.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/rows.h"

namespace gm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

#define GM_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)
// A call of a C shim. torch renamed its own macro for this after 2.11.
#define GM_SHIM(call) GM_CHECK((call) == 0, "gmkernels: " #call " failed")

inline std::string shape_text(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

inline DType float_dtype(const char* op, const char* name, ScalarType dtype) {
  if (dtype == ScalarType::Float) return DType::f32;
  if (dtype == ScalarType::BFloat16) return DType::bf16;
  GM_CHECK(dtype == ScalarType::Half, op, ": ", name,
           " must be float32, bfloat16 or float16 on the native backend; cast it, or use "
           "backend='reference'");
  return DType::f16;
}

// The device and the row layout that one call runs on: dimension 0 of `x` is rows, the rest
// columns.
struct Layout {
  const char* op;
  int64_t rows, columns;
  bool is_cuda;
  int32_t device;

  Layout(const char* op, const Tensor& x)
      : op(op), is_cuda(x.is_cuda()), device(x.get_device_index()) {
    GM_CHECK(is_cuda || x.is_cpu(), op, ": the native backend runs on cpu and cuda");
#if !defined(GM_CUDA)
    GM_CHECK(!is_cuda, op, ": this build of gmkernels has no CUDA kernels; use backend='triton'");
#endif
    GM_CHECK(x.dim() >= 1, op, ": inputs must have a batch dimension, got a 0-d tensor");
    rows = x.size(0);
    columns = 1;
    for (int64_t i = 1; i < x.dim(); ++i) columns *= x.size(i);
    GM_CHECK(columns <= (int64_t)1 << 34, op, ": a row may hold at most 2^34 elements, got ",
             columns);
  }

  void check_device(const char* name, const Tensor& x) const {
    GM_CHECK(x.is_cuda() == is_cuda && x.get_device_index() == device, op, ": ", name,
             " must be on the same device as the other tensors");
    int32_t layout;
    GM_SHIM(aoti_torch_get_layout(x.get(), &layout));
    GM_CHECK(layout == aoti_torch_layout_strided(), op, ": ", name,
             " must be dense, got a sparse tensor; call .to_dense()");
  }

  int64_t tasks() const { return rows * chunks_of(columns); }

  // Runs body(begin, end) over tasks on torch's threads; a thread gets at least 2^14 elements of
  // work, counting `weight` for each element.
  template <class Body>
  void parallel(const Body& body, int64_t weight = 1) const {
    const int64_t per_task = (columns < kChunk ? (columns < 16 ? 16 : columns) : kChunk) * weight;
    const int64_t grain = (1 << 14) / per_task + 1;
    if (tasks() <= grain) return body((int64_t)0, tasks());
    torch::stable::parallel_for(0, tasks(), grain, body);
  }

  // out[row] = scale * sum of the row + bias, where body(sums, begin, end) sums each task. The
  // order of addition follows from the shape alone.
  template <class Body>
  void sum_rows(float* out, double scale, double bias, const Body& body, int64_t weight = 1) const {
    const std::unique_ptr<double[]> sums(new double[tasks()]);
    parallel([&](int64_t begin, int64_t end) { body(sums.get(), begin, end); }, weight);
    const int64_t chunks = chunks_of(columns);
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0.0;
      for (int64_t c = 0; c < chunks; ++c) sum += sums[row * chunks + c];
      out[row] = (float)(scale * sum + bias);
    }
  }
};

// x as [rows, columns] with contiguous rows at any stride; stride 0 along dimension 0 broadcasts.
inline Operand operand(const Layout& layout, const char* name, const Tensor& x) {
  layout.check_device(name, x);
  const DType dtype = float_dtype(layout.op, name, x.scalar_type());
  GM_CHECK(x.dim() >= 1 && x.size(0) == layout.rows && x.numel() == layout.rows * layout.columns,
           layout.op, ": ", name, " must have ", layout.rows, " rows of ", layout.columns,
           " elements, got shape ", shape_text(x));
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i >= 1; --i) {
    GM_CHECK(x.numel() == 0 || x.size(i) == 1 || x.stride(i) == expected, layout.op, ": ", name,
             " must be contiguous within a row; call .contiguous()");
    expected *= x.size(i);
  }
  return {x.data_ptr(), x.stride(0), 1, dtype};
}

inline Operand operand(const Layout& layout, const char* name, const MaybeTensor& x) {
  return x ? operand(layout, name, *x) : Operand{};
}

// x [rows]: one value a row, shown to the kernel as a row of stride 0.
inline Operand row_operand(const Layout& layout, const char* name, const MaybeTensor& x) {
  if (!x) return {};
  layout.check_device(name, *x);
  const DType dtype = float_dtype(layout.op, name, x->scalar_type());
  GM_CHECK(x->dim() == 1 && x->size(0) == layout.rows, layout.op, ": ", name, " must have shape (",
           layout.rows, "), got ", shape_text(*x));
  return {x->data_ptr(), x->stride(0), 0, dtype};
}

// An uninitialised contiguous tensor on a device; a failure names the op, the shape and the
// bytes.
inline Tensor allocate_on(const char* op, int32_t type, int32_t device, const int64_t* sizes,
                          int64_t dim, ScalarType dtype) {
  std::vector<int64_t> strides(dim);
  const bool is_long = dtype == ScalarType::Long;
  int64_t bytes = dtype == ScalarType::Float ? 4 : dtype == ScalarType::Double || is_long ? 8 : 2;
  for (int64_t i = dim - 1, step = 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
    bytes *= sizes[i];
  }
  const int32_t code = is_long                         ? aoti_torch_dtype_int64()
                       : dtype == ScalarType::Float    ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  AtenTensorHandle handle;
  const auto status =
      aoti_torch_empty_strided(dim, sizes, strides.data(), code, type, device, &handle);
  if (status != 0) {
    std::string text = "(";
    for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    GM_CHECK(false, op, ": could not allocate an output of shape ", text, "), ", bytes, " bytes");
  }
  return Tensor(handle);
}

inline Tensor allocate(const char* op, const Tensor& like, const int64_t* sizes, int64_t dim,
                       ScalarType dtype) {
  int32_t type, device;
  GM_SHIM(aoti_torch_get_device_type(like.get(), &type));
  GM_SHIM(aoti_torch_get_device_index(like.get(), &device));
  return allocate_on(op, type, device, sizes, dim, dtype);
}

inline Tensor allocate_like(const char* op, const Tensor& like) {
  const auto sizes = like.sizes();
  return allocate(op, like, sizes.data(), (int64_t)sizes.size(), like.scalar_type());
}

inline Tensor allocate_rows(const Layout& layout, const Tensor& like) {
  return allocate(layout.op, like, &layout.rows, 1, ScalarType::Float);
}

// What stands for an output that was not asked for.
inline Tensor allocate_nothing(const char* op, const Tensor& like) {
  const int64_t zero = 0;
  return allocate(op, like, &zero, 1, like.scalar_type());
}

inline Result result(const char* op, const Tensor& y, int64_t columns) {
  if (y.numel() == 0) return {};
  const DType dtype = float_dtype(op, "output", y.scalar_type());
  const int64_t bytes = y.numel() * (dtype == DType::f32 ? 4 : 2);
  const bool aligned = (uintptr_t)y.data_ptr() % 64 == 0 && columns % 16 == 0;
  return {y.data_ptr(), columns, dtype, aligned && bytes >= kStreamBytes};
}

// Gradients of the wanted inputs; bit i of needs stands for input i. What is not wanted stays
// empty.
struct Wanted {
  const Layout& layout;
  int64_t needs;
  Tensor operator()(int bit, const MaybeTensor& like, const Tensor& fallback, Result& slot) const {
    if (!(needs >> bit & 1) || !like) return allocate_nothing(layout.op, fallback);
    const Tensor gradient = allocate_like(layout.op, *like);
    slot = result(layout.op, gradient, layout.columns);
    return gradient;
  }
};

// A key tensor of two int64 (seed, offset): read here on the CPU, handed on as a pointer on the
// GPU.
struct Key {
  NoiseKey host;
  const int64_t* device = nullptr;
};

inline Key read_key(const char* op, const Tensor& key, int64_t stream) {
  GM_CHECK(key.scalar_type() == ScalarType::Long && key.numel() == 2 && key.is_contiguous(), op,
           ": key must be a contiguous int64 tensor of two elements (seed, offset)");
  Key k;
  k.host.stream = (uint32_t)stream;
  const int64_t* data = (const int64_t*)key.data_ptr();
  if (!key.is_cpu()) {
    k.device = data;
    return k;
  }
  GM_CHECK(data[1] >= 0, op, ": offset must be >= 0, got ", data[1]);
  k.host.seed = (uint64_t)data[0];
  k.host.offset = (uint64_t)data[1];
  return k;
}

// The noise of a call, into args with members eps, key and key_ptr: given, or made from a key.
template <class Args>
void read_noise(const Layout& layout, const MaybeTensor& eps, const MaybeTensor& key, Args& args) {
  GM_CHECK(eps.has_value() != key.has_value(), layout.op, ": give exactly one of eps and key");
  if (eps) {
    args.eps = operand(layout, "eps", *eps);
    return;
  }
  const Key k = read_key(layout.op, *key, 0);
  GM_CHECK(layout.is_cuda || !k.device, layout.op, ": the key must be on the CPU for CPU tensors");
  if (k.device) layout.check_device("key", *key);
  args.key = k.host;
  args.key_ptr = k.device;
}

#if defined(GM_CUDA)
// Makes a device current for the launch and gives PyTorch's stream on it.
class CudaScope {
 public:
  explicit CudaScope(int32_t device) {
    GM_SHIM(aoti_torch_create_cuda_guard(device, &guard_));
    GM_SHIM(aoti_torch_get_current_cuda_stream(device, &stream_));
  }
  ~CudaScope() { aoti_torch_delete_cuda_guard(guard_); }
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;
  void* stream() const { return stream_; }

 private:
  CUDAGuardHandle guard_;
  void* stream_;
};
#endif

}  // namespace gm
