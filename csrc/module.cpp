// gmkernels._C: what this build is, what this CPU can do, and the host maths on NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/philox.h"
#include "common/rows.h"
#include "noise/noise.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace py = pybind11;

namespace gm {

static const char* const kIsaNames[] = {"portable", "v3", "v4", "v4_bf16"};

Isa best_isa() {
#if defined(GM_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16")) return Isa::v4_bf16;
  return v4 ? Isa::v4 : v3 ? Isa::v3 : Isa::portable;
#else
  return Isa::portable;
#endif
}

std::atomic<Isa> active_isa{best_isa()};

static std::string isa() { return kIsaNames[(int)active_isa.load()]; }

static std::vector<std::string> available_isas() {
  return {kIsaNames, kIsaNames + (int)best_isa() + 1};
}

static void set_isa(const std::string& name) {
  for (int i = 0; i <= (int)best_isa(); ++i) {
    if (name == kIsaNames[i]) {
      active_isa = (Isa)i;
      return;
    }
  }
  std::string usable;
  for (const auto& isa : available_isas()) usable += (usable.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("set_isa: this CPU and build run " + usable + "; got '" + name + "'");
}

static py::dict build_info() {
  py::dict info;
  info["compiler"] = GM_COMPILER;
#if defined(GM_X86)
  info["objects"] = std::vector<std::string>{"portable", "v3", "v4", "v4_bf16"};
#else
  info["objects"] = std::vector<std::string>{"portable"};
#endif
  info["cuda_archs"] = GM_CUDA_ARCHS;
  info["stable_abi_target"] = GM_ABI_TARGET;
  info["version"] = GM_VERSION;
  return info;
}

static py::dict cpu_features() {
  py::dict features;
#if defined(GM_X86)
  __builtin_cpu_init();
  features["avx2"] = (bool)__builtin_cpu_supports("avx2");
  features["fma"] = (bool)__builtin_cpu_supports("fma");
  features["avx512f"] = (bool)__builtin_cpu_supports("avx512f");
  features["avx512bw"] = (bool)__builtin_cpu_supports("avx512bw");
  features["avx512dq"] = (bool)__builtin_cpu_supports("avx512dq");
  features["avx512vl"] = (bool)__builtin_cpu_supports("avx512vl");
  features["avx512bf16"] = (bool)__builtin_cpu_supports("avx512bf16");
#endif
  return features;
}

// Large blocks come from the heap and stay there: no page faults on the next allocation of that
// size.
static bool reuse_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, 0x7fffffff) == 1;
#else
  return false;
#endif
}

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

static Array<uint32_t> philox(const Array<uint32_t>& counters, uint64_t seed) {
  if (counters.ndim() != 2 || counters.shape(1) != 4)
    throw std::invalid_argument("philox: counters must have shape (n, 4)");
  Array<uint32_t> words({counters.shape(0), (py::ssize_t)4});
  for (py::ssize_t i = 0; i < counters.shape(0); ++i) {
    uint32_t c[4];
    for (int j = 0; j < 4; ++j) c[j] = counters.at(i, j);
    portable::philox4x32_10(c[0], c[1], c[2], c[3], (uint32_t)seed, (uint32_t)(seed >> 32));
    for (int j = 0; j < 4; ++j) words.mutable_at(i, j) = c[j];
  }
  return words;
}

static Array<float> noise(Distribution distribution, int64_t seed, int64_t offset, uint32_t stream,
                          int64_t rows, int64_t columns) {
  if (rows < 0 || columns < 0 || offset < 0)
    throw std::invalid_argument("noise: rows, columns and offset must be >= 0");
  Array<float> out({rows, columns});
  const Result result{out.mutable_data(), columns, DType::f32};
  const NoiseKey key{(uint64_t)seed, (uint64_t)offset, stream};
  if (out.size())
    select_noise_table().fill(distribution, key, result, columns, 0, rows * chunks_of(columns));
  return out;
}

template <void (*HostMath::*Function)(const float*, float*, int64_t)>
static Array<float> unary(const Array<float>& x) {
  Array<float> y(x.size());
  (select_noise_table().math.*Function)(x.data(), y.mutable_data(), x.size());
  return y;
}

static py::tuple sincospi(const Array<float>& x) {
  Array<float> sine(x.size()), cosine(x.size());
  select_noise_table().math.sincospi(x.data(), sine.mutable_data(), cosine.mutable_data(),
                                     x.size());
  return py::make_tuple(sine, cosine);
}

static Array<float> normal_from_words(const Array<uint32_t>& words) {
  if (words.size() % 2) throw std::invalid_argument("normal_from_words: words come in pairs");
  Array<float> y(words.size());
  select_noise_table().math.normal_from_words(words.data(), y.mutable_data(), words.size() / 2);
  return y;
}

static Array<float> host_normal(int64_t seed, int64_t offset, uint32_t stream, int64_t rows,
                                int64_t columns) {
  return noise(Distribution::normal, seed, offset, stream, rows, columns);
}

static Array<float> host_uniform(int64_t seed, int64_t offset, uint32_t stream, int64_t rows,
                                 int64_t columns) {
  return noise(Distribution::uniform, seed, offset, stream, rows, columns);
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Native kernels of gmkernels: build info, CPU features and host maths over NumPy arrays.";
  m.def("build_info", &build_info);
  m.def("cpu_features", &cpu_features);
  m.def("isa", &isa, "The instruction set in use.");
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("reuse_memory", &reuse_memory);
  m.def("philox", &philox, py::arg("counters"), py::arg("seed"));
  m.def("normal", &host_normal, py::arg("seed"), py::arg("offset"), py::arg("stream"),
        py::arg("rows"), py::arg("columns"));
  m.def("uniform", &host_uniform, py::arg("seed"), py::arg("offset"), py::arg("stream"),
        py::arg("rows"), py::arg("columns"));
  m.def("normal_from_words", &normal_from_words, py::arg("words"));
  m.def("exp", &unary<&HostMath::exp>, py::arg("x"));
  m.def("log", &unary<&HostMath::log>, py::arg("x"));
  m.def("log1p_unit", &unary<&HostMath::log1p_unit>, py::arg("x"));
  m.def("sincospi", &sincospi, py::arg("x"));
}

}  // namespace gm
