// The counter-based noise as an op of its own, and the host functions that the accuracy tests call.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace gm {

enum class Distribution : int { normal, uniform };

// Elementary functions over float32 arrays, one name an entry.
struct HostMath {
  void (*exp)(const float* x, float* y, int64_t n);
  void (*log)(const float* x, float* y, int64_t n);
  void (*log1p_unit)(const float* x, float* y, int64_t n);
  void (*sincospi)(const float* x, float* sine, float* cosine, int64_t n);  // of pi x, x in (0, 2]
  void (*normal_from_words)(const uint32_t* words, float* y, int64_t pairs);
};

struct NoiseTable {
  // Fills tasks [begin, end) of a [rows, columns] output; see rows.h.
  void (*fill)(Distribution distribution, const NoiseKey& key, const Result& out, int64_t columns,
               int64_t begin, int64_t end);
  HostMath math;
};

GM_KERNEL_TABLE(NoiseTable, noise_table)

// CUDA: key_ptr (two int64 on the device) replaces key.seed and key.offset where it is not null.
void noise_fill_cuda(Distribution distribution, const NoiseKey& key, const int64_t* key_ptr,
                     const Result& out, int64_t rows, int64_t columns, void* stream);

}  // namespace gm
