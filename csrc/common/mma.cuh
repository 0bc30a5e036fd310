// What matrix kernels need beyond CUDA C++, for sm_80 and later: products of 16-bit tiles on tensor
// cores, copies into shared memory that do not wait, exponentials. All PTX of such kernels is here.
//
// A fragment is a 16 x 8 matrix of float32 spread over a warp: lane 4 g + t holds columns 2 t and
// 2 t + 1 of row g, then the same of row g + 8.
#pragma once

#include <cuda_runtime.h>

#include "common/pack.cuh"

namespace gm {
namespace device {

// The dynamic shared memory of the block, aligned to 16 bytes.
static __device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 gm_shared_memory[];
  return gm_shared_memory;
}

static __device__ __forceinline__ uint32_t shared_address(const void* x) {
  return (uint32_t)__cvta_generic_to_shared(x);
}

// Four 8 x 8 matrices of 16 bits. Lane 8 i + r gives the address of row r of matrix i; lane 4 g + t
// gets elements 2 t and 2 t + 1 of row g of each.
static __device__ __forceinline__ void load_matrices(const void* row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}

// The same of the transposed matrices.
static __device__ __forceinline__ void load_transposed(const void* row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}

// c += a b of a 16 x 16 matrix a and a 16 x 8 matrix b. Lane 4 g + t holds, two neighbours a word:
// a[g][2t], a[g + 8][2t], a[g][2t + 8], a[g + 8][2t + 8]; b[2t][g], b[2t + 8][g], down a column.
static __device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
static __device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins to copy 16 bytes into shared memory, zeros if not `exists`; both addresses are multiples
// of 16.
static __device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
// Ends a group of this thread's copies.
static __device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's copies but for those of the last kLater groups.
template <int kLater>
static __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// 2^x to 2 ulp; 0 where the result is below the normal range.
static __device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace device
}  // namespace gm
