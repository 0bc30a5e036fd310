#include <cassert>

#include "common/noise.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "gaussian/gaussian.h"

namespace gm {
namespace device {

// Where eps comes from; none where z plays no part.
enum class Eps { none, given, drawn };

// Group g of an operand that may be absent: then it reads as 0.
template <bool kVector, class T, int N>
static __device__ __forceinline__ void load_or_zero(const Operand& x, const RowIn<T>& row, int g,
                                                    int count, float (&out)[N]) {
  if (x.data) return row.template load<kVector>(g, count, out);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = 0.0f;
}

// Blocks that a multiprocessor must hold: as many as go without spills. Unasked, ptxas saves more
// registers than that and puts off loads for it.
template <class T, bool kPrior>
constexpr int kForwardBlocks = kWidth<T> == 8 ? 2
                               : kPrior       ? 3
                                              : 4;
template <bool kPrior>
constexpr int kBackwardBlocks = kPrior ? 2 : 3;

// z and the KL of a row chunk, by the lanes of a RowGrid.
template <class T, bool kPrior, Eps kEps>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, kPrior>) gaussian_forward_kernel(
    // mean, logvar [B, D]; prior_mean, prior_logvar [B, D] or null, each; eps [B, D] where
    // given; key or key_ptr where drawn; z [B, D] unless kEps is none; partial [B, chunks],
    // null if chunks is 1; kl [B], written where partial is null. T is the dtype of all but kl
    // and partial.
    const __grid_constant__ GaussianArgs a, const __grid_constant__ RowGrid grid) {
  constexpr int N = kWidth<T>;
  const NoiseKey key = kEps == Eps::drawn ? read_key(a.key, a.key_ptr) : NoiseKey{};
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    const int64_t start = chunk * kChunk;
    const RowIn<T> mean(a.mean, row, start), logvar(a.logvar, row, start), eps(a.eps, row, start);
    const RowIn<T> prior_mean(a.prior_mean, row, start), prior_logvar(a.prior_logvar, row, start);
    const RowOut<T> z(a.z, row, start);
    float sum = 0.0f;
    for_groups<N>(grid, lane, columns, [&](auto vector, int g, int count) {
      float m[N], l[N], sigma[N], term[N];
      [[maybe_unused]] float pm[N], pl[N], e[N];
      mean.template load<vector>(g, count, m);
      logvar.template load<vector>(g, count, l);
      if constexpr (kPrior) {
        load_or_zero<vector>(a.prior_mean, prior_mean, g, count, pm);
        load_or_zero<vector>(a.prior_logvar, prior_logvar, g, count, pl);
      }
      if constexpr (kEps == Eps::given) eps.template load<vector>(g, count, e);
      if constexpr (kEps == Eps::drawn) normals(key, row, start / 4 + g * (N / 4), e);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float twice = kl_term<kPrior>(m[i], clamp(l[i], a.low, a.high), kPrior ? pm[i] : 0.0f,
                                            kPrior ? pl[i] : 0.0f, sigma[i]);
        term[i] = i < count ? twice : 0.0f;
      }
      sum += group_sum(term);
      if constexpr (kEps != Eps::none) {
#pragma unroll
        for (int i = 0; i < N; ++i) e[i] = fma(sigma[i], e[i], m[i]);
        z.template store<vector>(g, count, e);
      }
    });
    sum = row_sum(sum, grid);
    if (lane != 0 || row < 0) return;
    if (a.partial) {
      a.partial[row * grid.chunks + chunk] = sum;
    } else {
      a.kl[row] = 0.5f * sum;
    }
  });
}

// kl of rows that have several chunks: a warp a row, in a fixed order.
__global__ void __launch_bounds__(kThreads) kl_sum_kernel(const float* partial,  // [B, chunks]
                                                          float* kl,             // [B]
                                                          const __grid_constant__ RowGrid grid) {
  for_row_chunks(grid, [&](int64_t row, int64_t, int columns, int lane) {
    double sum = 0.0;
    if (columns) {
      for (int64_t i = lane; i < grid.columns; i += 32) sum += partial[row * grid.columns + i];
    }
    sum = row_sum(sum, grid);
    if (lane == 0 && row >= 0) kl[row] = (float)(0.5 * sum);
  });
}

// Gradients, by the lanes of a RowGrid. kColumns: dkl is [D], one value a column.
template <class T, bool kPrior, Eps kEps, bool kColumns>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kPrior>) gaussian_backward_kernel(
    // mean, logvar [B, D]; prior_mean, prior_logvar [B, D] or null, each; eps [B, D] where given;
    // key or key_ptr where drawn; dz [B, D] unless kEps is none; dkl [B] or [D], or null, any
    // dtype; dmean, dlogvar, dprior_mean, dprior_logvar, deps [B, D] or null, each.
    const __grid_constant__ GaussianArgs a, const __grid_constant__ RowGrid grid) {
  constexpr int N = kWidth<T>;
  const NoiseKey key = kEps == Eps::drawn ? read_key(a.key, a.key_ptr) : NoiseKey{};
  for_row_chunks(grid, [&](int64_t row, int64_t chunk, int columns, int lane) {
    if (!columns) return;
    const int64_t start = chunk * kChunk;
    const RowIn<T> mean(a.mean, row, start), logvar(a.logvar, row, start), eps(a.eps, row, start);
    const RowIn<T> prior_mean(a.prior_mean, row, start), prior_logvar(a.prior_logvar, row, start);
    const RowIn<T> dz(a.dz, row, start);
    const RowOut<T> dmean(a.dmean, row, start), dlogvar(a.dlogvar, row, start);
    const RowOut<T> dprior_mean(a.dprior_mean, row, start), deps(a.deps, row, start);
    const RowOut<T> dprior_logvar(a.dprior_logvar, row, start);
    float row_dkl = 0.0f;
    if (!kColumns && a.dkl.data) row_dkl = read_value(a.dkl, row * a.dkl.row_stride) * a.dkl_scale;
    for_groups<N>(grid, lane, columns, [&](auto vector, int g, int count) {
      float m[N], l[N], pm[N], pl[N], e[N], dkl[N];
      [[maybe_unused]] float d[N];
      mean.template load<vector>(g, count, m);
      logvar.template load<vector>(g, count, l);
      if constexpr (kPrior) {
        load_or_zero<vector>(a.prior_mean, prior_mean, g, count, pm);
        load_or_zero<vector>(a.prior_logvar, prior_logvar, g, count, pl);
      }
      if constexpr (kEps != Eps::none) dz.template load<vector>(g, count, d);
      if constexpr (kEps == Eps::given) eps.template load<vector>(g, count, e);
      if constexpr (kEps == Eps::drawn) normals(key, row, start / 4 + g * (N / 4), e);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dkl[i] = row_dkl;
        if (kColumns && i < count) dkl[i] = read_value(a.dkl, start + g * N + i) * a.dkl_scale;
        constexpr bool sample = kEps != Eps::none;
        const auto gradient = gaussian_gradients<kPrior, sample>(
            m[i], l[i], kPrior ? pm[i] : 0.0f, kPrior ? pl[i] : 0.0f, sample ? e[i] : 0.0f,
            sample ? d[i] : 0.0f, dkl[i], a.low, a.high);
        m[i] = gradient.dmean, l[i] = gradient.dlogvar, e[i] = gradient.deps;
        pm[i] = gradient.dprior_mean, pl[i] = gradient.dprior_logvar;
      }
      if (a.dmean.data) dmean.template store<vector>(g, count, m);
      if (a.dlogvar.data) dlogvar.template store<vector>(g, count, l);
      if (kPrior && a.dprior_mean.data) dprior_mean.template store<vector>(g, count, pm);
      if (kPrior && a.dprior_logvar.data) dprior_logvar.template store<vector>(g, count, pl);
      if (kEps == Eps::given && a.deps.data) deps.template store<vector>(g, count, e);
    });
  });
}

template <class T, bool kPrior, Eps kEps>
static void launch_forward(const GaussianArgs& a, const RowGrid& grid, void* stream) {
  const char* op = kEps == Eps::none ? "gaussian_kl" : "reparameterize_kl";
  assert(grid.chunks == 1 || a.partial);
  launch_rows(op, &gaussian_forward_kernel<T, kPrior, kEps>, grid, stream, a);
  if (grid.chunks > 1) {
    const RowGrid warps{a.rows, grid.chunks, 1, 5, false};
    launch_rows(op, &kl_sum_kernel, warps, stream, a.partial, a.kl);
  }
}

template <class T, bool kPrior, Eps kEps, bool kColumns = false>
static void launch_backward(const GaussianArgs& a, const RowGrid& grid, void* stream) {
  const char* op = kEps == Eps::none ? "gaussian_kl_backward" : "reparameterize_kl_backward";
  launch_rows(op, &gaussian_backward_kernel<T, kPrior, kEps, kColumns>, grid, stream, a);
}

template <class T, bool kPrior>
static void forward(const GaussianArgs& a, const RowGrid& grid, void* stream) {
  if (!a.z.data) return launch_forward<T, kPrior, Eps::none>(a, grid, stream);
  if (a.eps.data) return launch_forward<T, kPrior, Eps::given>(a, grid, stream);
  launch_forward<T, kPrior, Eps::drawn>(a, grid, stream);
}

template <class T, bool kPrior>
static void backward(const GaussianArgs& a, const RowGrid& grid, void* stream) {
  if (a.dz.data) {
    if (a.eps.data) return launch_backward<T, kPrior, Eps::given>(a, grid, stream);
    return launch_backward<T, kPrior, Eps::drawn>(a, grid, stream);
  }
  if (a.dkl.data && a.dkl.stride)
    return launch_backward<T, kPrior, Eps::none, true>(a, grid, stream);
  launch_backward<T, kPrior, Eps::none>(a, grid, stream);
}

}  // namespace device

void gaussian_forward_cuda(const GaussianArgs& a, void* stream) {
  device::with_dtype(a.rows, a.columns,
                     {a.mean, a.logvar, a.prior_mean, a.prior_logvar, a.eps, a.z},
                     [&](auto type, const device::RowGrid& grid) {
                       using T = decltype(type);
                       a.has_prior() ? device::forward<T, true>(a, grid, stream)
                                     : device::forward<T, false>(a, grid, stream);
                     });
}

void gaussian_backward_cuda(const GaussianArgs& a, void* stream) {
  device::with_dtype(a.rows, a.columns,
                     {a.mean, a.logvar, a.prior_mean, a.prior_logvar, a.eps, a.dz, a.dmean,
                      a.dlogvar, a.dprior_mean, a.dprior_logvar, a.deps},
                     [&](auto type, const device::RowGrid& grid) {
                       using T = decltype(type);
                       a.has_prior() ? device::backward<T, true>(a, grid, stream)
                                     : device::backward<T, false>(a, grid, stream);
                     });
}

}  // namespace gm
