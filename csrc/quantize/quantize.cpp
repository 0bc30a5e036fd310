#include "quantize/quantize.h"

#include <limits>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace gm {

static void check_matrix(const Layout& layout, const char* name, const Tensor& x) {
  GM_CHECK(!layout.is_cuda, layout.op, ": has no CUDA C++ kernel; use backend='triton'");
  GM_CHECK(x.dim() == 2, layout.op, ": ", name, " must have two dimensions, got ", shape_text(x));
}

static Tensor nearest_code(const Tensor& x, const Tensor& codebook) {
  const Layout layout("nearest_code", x), codes("nearest_code", codebook);
  check_matrix(layout, "x", x);
  check_matrix(layout, "codebook", codebook);
  GM_CHECK(codes.columns == layout.columns && codes.columns >= 1, layout.op,
           ": x and codebook must have rows of one width >= 1, got ", shape_text(x), " and ",
           shape_text(codebook));
  GM_CHECK(codes.rows >= 1 && codes.rows <= std::numeric_limits<int32_t>::max(), layout.op,
           ": the codebook must hold 1 to 2^31 - 1 codes, got ", codes.rows);
  SearchArgs a;
  a.x = operand(layout, "x", x);
  a.rows = layout.rows;
  a.count = codes.rows;
  a.width = codes.columns;
  const Operand rows = operand(codes, "codebook", codebook);
  const QuantizeTable& table = select_quantize_table();
  const bool in_place = rows.dtype == DType::f32 && (rows.row_stride == a.width || a.count == 1);
  std::vector<float> widened(in_place ? 0 : a.count * a.width), half(a.count);
  if (!in_place) table.widen(rows, a.count, a.width, widened.data());
  a.codes = in_place ? (const float*)rows.data : widened.data();
  a.longest = table.half_norms(a.codes, a.count, a.width, half.data());
  a.half = half.data();
  const Tensor indices = allocate(layout.op, x, &layout.rows, 1, ScalarType::Long);
  a.indices = (int64_t*)indices.data_ptr();
  const int64_t tasks = (a.rows + kSearchRows - 1) / kSearchRows;
  const auto body = [&](int64_t begin, int64_t end) { table.search(a, begin, end); };
  if (tasks <= 1 || (double)a.rows * a.count * a.width < 1e5) {
    if (tasks > 0) body(0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, 1, body);
  }
  return indices;
}

static std::tuple<Tensor, Tensor> code_statistics(const Tensor& x, const Tensor& indices,
                                                  int64_t count) {
  const Layout layout("code_statistics", x);
  check_matrix(layout, "x", x);
  layout.check_device("indices", indices);
  GM_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 1 &&
               indices.size(0) == layout.rows && indices.is_contiguous(),
           layout.op, ": indices must be a contiguous int64 tensor of ", layout.rows,
           " elements, got shape ", shape_text(indices));
  GM_CHECK(count >= 0, layout.op, ": codes must be >= 0, got ", count);
  const int64_t sizes[2] = {count, layout.columns};
  const Tensor counts = allocate(layout.op, x, sizes, 1, ScalarType::Long);
  const Tensor sums = allocate(layout.op, x, sizes, 2, ScalarType::Float);
  // A stable counting sort of the rows by code.
  const int64_t* index = (const int64_t*)indices.data_ptr();
  std::vector<int64_t> starts(count + 1, 0), order(layout.rows);
  for (int64_t i = 0; i < layout.rows; ++i) {
    GM_CHECK(index[i] >= 0 && index[i] < count, layout.op, ": indices must lie in [0, ", count,
             "), got ", index[i], " in row ", i);
    ++starts[index[i] + 1];
  }
  int64_t* n = (int64_t*)counts.data_ptr();
  for (int64_t k = 0; k < count; ++k) {
    n[k] = starts[k + 1];
    starts[k + 1] += starts[k];
  }
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < layout.rows; ++i) order[next[index[i]]++] = i;
  const SumArgs a{operand(layout, "x", x), order.data(), starts.data(), layout.columns,
                  (float*)sums.data_ptr()};
  const QuantizeTable& table = select_quantize_table();
  const auto body = [&](int64_t begin, int64_t end) { table.sum_rows(a, begin, end); };
  const int64_t work = (layout.rows + count) * (layout.columns + 1);
  if (count <= 1 || work < 1 << 16) {
    body(0, count);
  } else {
    torch::stable::parallel_for(0, count, 1, body);
  }
  return {counts, sums};
}

STABLE_TORCH_LIBRARY_FRAGMENT(gmkernels, m) {
  m.def("nearest_code(Tensor x, Tensor codebook) -> Tensor");
  m.def("code_statistics(Tensor x, Tensor indices, SymInt codes) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gmkernels, CompositeExplicitAutograd, m) {
  m.impl("nearest_code", TORCH_BOX(&nearest_code));
  m.impl("code_statistics", TORCH_BOX(&code_statistics));
}

}  // namespace gm
