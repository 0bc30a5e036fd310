// The dtypes that kernels read and write, as a run-time tag, and the operand that carries one.
#pragma once

#include <cstdint>

// GM_HD marks a formula that host and device share. GM_ISA is the namespace of the object being
// compiled (portable, v3, v4; device under nvcc): no two objects may share an inline function, or
// the linker could hand AVX-512 code to a machine that lacks it.
#if defined(__CUDACC__)
#define GM_HD static __host__ __device__ __forceinline__
#define GM_ISA device
#else
#define GM_HD static inline
#ifndef GM_ISA
#define GM_ISA portable
#endif
#endif

namespace gm {

enum class DType : int32_t { f32, bf16, f16, i64, i32, u8 };

// A tensor seen as rows: element (b, d) is at data[b * row_stride + d * stride], stride 0 or 1.
// data is null where the operand is absent.
struct Operand {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int32_t stride = 1;
  DType dtype = DType::f32;
};

// A contiguous output of rows. data is null where it is not wanted. streaming: too large to be
// found in a cache later, so a CPU kernel writes it past them.
struct Result {
  void* data = nullptr;
  int64_t row_stride = 0;
  DType dtype = DType::f32;
  bool streaming = false;
};

// Where noise comes from: a key of two int64 (seed, offset), and the stream of the draw.
struct NoiseKey {
  uint64_t seed = 0;
  uint64_t offset = 0;
  uint32_t stream = 0;
};

}  // namespace gm
