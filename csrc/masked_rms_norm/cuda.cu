// cuda.cu: masked RMSNorm on CUDA.
//
// Forward: one block per token, which adds the branch and counts the live dimensions while it sums the squares.
// Backward: one block per strip of tokens. A thread owns packs of columns: of the first kKept, the token's values and
// the strip's column sums stay in registers; of the rest, values are read again and sums stand in the strip's row of
// `partial`. A second kernel adds the strips in order and makes the gradients of weight and masks.
#include "../cuda_launch.cuh"
#include "masked_rms_norm.h"

namespace megashear {
namespace {

constexpr int kKept = 3;  // packs of 16 bytes of 256 threads: 6144 columns of bf16 or fp16

// ---- kernels --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t column_of(int pack, int width) {
  return (static_cast<int64_t>(pack) * kThreads + threadIdx.x) * width;
}

template <typename T, int N, bool Add>
__global__ void __launch_bounds__(kThreads, 3) forward_kernel(NormForward norm, int64_t tokens, int64_t hidden) {
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const T* x = static_cast<const T*>(norm.x) + token * norm.x_row;
    const T* branch = static_cast<const T*>(norm.branch) + (Add ? token * norm.branch_row : 0);
    T* sum = static_cast<T*>(norm.sum) + (Add ? token * hidden : 0);
    T* out = static_cast<T*>(norm.out) + token * hidden;
    float square = 0.0f, live = 0.0f;
    const auto take = [&](int64_t j) {
      Pack<T, N> pack = load<T, N>(x + j);
      if constexpr (Add) {
        const Pack<T, N> added = load<T, N>(branch + j);
        float factor[N];
        load_mask<N>(factor, norm.branch_mask, j);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          pack.value[i] = narrow<T>(widen(pack.value[i]) + widen(added.value[i]) * factor[i]);
        }
        store<T, N>(sum + j, pack);
      }
      float mask[N];
      load_mask<N>(mask, norm.mask, j);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float value = live_or_zero(widen(pack.value[i]), mask[i]);
        square += value * value;
        live += mask[i] != 0.0f ? 1.0f : 0.0f;
      }
      return pack;
    };
    Pack<T, N> kept[kKept];
#pragma unroll
    for (int p = 0; p < kKept; ++p) {
      if (column_of(p, N) < hidden) kept[p] = take(column_of(p, N));
    }
#pragma unroll 1
    for (int64_t j = column_of(kKept, N); j < hidden; j += kThreads * N) take(j);
    square = block_sum(square);
    live = block_sum(live);
    const float r = 1.0f / sqrtf(square / fmaxf(live, 1.0f) + norm.eps);
    if (threadIdx.x == 0) norm.r[token] = r;
    const auto give = [&](int64_t j, Pack<T, N> pack) {
      float mask[N], weight[N];
      load_mask<N>(mask, norm.mask, j);
      load_floats<N>(weight, norm.weight + j);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        pack.value[i] = narrow<T>(masked_rms_norm(normalised<T>(widen(pack.value[i]), r), weight[i], mask[i]));
      }
      store<T, N>(out + j, pack);
    };
#pragma unroll
    for (int p = 0; p < kKept; ++p) {
      if (column_of(p, N) < hidden) give(column_of(p, N), kept[p]);
    }
#pragma unroll 1
    for (int64_t j = column_of(kKept, N); j < hidden; j += kThreads * N) give(j, load<T, N>((Add ? sum : x) + j));
  }
}

// One thread's columns of one pack: their sums over the strip's tokens.
template <int N, bool Branch>
struct ColumnSums {
  float norm[N], branch[Branch ? N : 1];
};

// What a strip's tokens share.
template <typename T, int N, bool Branch>
struct StripRows {
  const T *dout, *dsum, *x, *branch;
  T *dx, *dbranch;

  __device__ __forceinline__ StripRows(const NormBackward& norm, int64_t token, int64_t hidden)
      : dout(static_cast<const T*>(norm.dout) + token * norm.dout_row),
        dsum(norm.dsum == nullptr ? nullptr : static_cast<const T*>(norm.dsum) + token * norm.dsum_row),
        x(static_cast<const T*>(norm.x) + token * norm.x_row),
        branch(Branch ? static_cast<const T*>(norm.branch) + token * norm.branch_row : nullptr),
        dx(static_cast<T*>(norm.dx) + token * hidden),
        dbranch(Branch ? static_cast<T*>(norm.dbranch) + token * hidden : nullptr) {}

  // The columns' share of sum over k of dh x.
  __device__ __forceinline__ float dot(const NormBackward& norm, int64_t j, const Pack<T, N>& upstream,
                                       const Pack<T, N>& value) const {
    float weight[N], mask[N], sum = 0.0f;
    load_floats<N>(weight, norm.weight + j);
    load_mask<N>(mask, norm.mask, j);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += widen(upstream.value[i]) * weight[i] * mask[i] * widen(value.value[i]);
    return sum;
  }

  __device__ __forceinline__ void give(const NormBackward& norm, int64_t j, const Pack<T, N>& upstream,
                                       const Pack<T, N>& value, float r, float pull,
                                       ColumnSums<N, Branch>& sums) const {
    float weight[N], mask[N], d[N];
    load_floats<N>(weight, norm.weight + j);
    load_mask<N>(mask, norm.mask, j);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float slope = widen(upstream.value[i]), at = widen(value.value[i]);
      sums.norm[i] += slope * normalised<T>(at, r);
      d[i] = masked_rms_norm_dx(slope, at, weight[i], mask[i], r, pull);
    }
    if (dsum != nullptr) {
      const Pack<T, N> besides = load<T, N>(dsum + j);
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] += widen(besides.value[i]);
    }
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.value[i] = narrow<T>(d[i]);
    store<T, N>(dx + j, result);
    if constexpr (Branch) {
      const Pack<T, N> added = load<T, N>(branch + j);
      float factor[N];
      load_mask<N>(factor, norm.branch_mask, j);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums.branch[i] += d[i] * widen(added.value[i]);
        result.value[i] = narrow<T>(d[i] * factor[i]);
      }
      store<T, N>(dbranch + j, result);
    }
  }
};

// `column` and `branch_column`: this strip's rows of the tables.
template <int N, bool Branch>
__device__ __forceinline__ void read_sums(ColumnSums<N, Branch>& sums, const float* column, const float* branch_column,
                                          int64_t j) {
  load_floats<N>(sums.norm, column + j);
  if constexpr (Branch) load_floats<N>(sums.branch, branch_column + j);
}

template <int N, bool Branch>
__device__ __forceinline__ void write_sums(const ColumnSums<N, Branch>& sums, float* column, float* branch_column,
                                           int64_t j) {
  store_floats<N>(column + j, sums.norm);
  if constexpr (Branch) store_floats<N>(branch_column + j, sums.branch);
}

template <typename T, int N, bool Branch>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(NormBackward norm, int64_t tokens, int64_t hidden, int64_t strip_size) {
  using Sums = ColumnSums<N, Branch>;
  float* column = norm.partial + blockIdx.x * hidden;
  float* branch_column = column + gridDim.x * hidden;
  Sums kept_sums[kKept] = {};
  float live = 0.0f;
#pragma unroll 1
  for (int64_t j = column_of(0, N); j < hidden; j += kThreads * N) {
    float mask[N];
    load_mask<N>(mask, norm.mask, j);
#pragma unroll
    for (int i = 0; i < N; ++i) live += mask[i] != 0.0f ? 1.0f : 0.0f;
    if (j >= column_of(kKept, N)) write_sums(Sums{}, column, branch_column, j);
  }
  live = fmaxf(block_sum(live), 1.0f);
  const int64_t begin = blockIdx.x * strip_size;
  const int64_t end = begin + strip_size < tokens ? begin + strip_size : tokens;
  for (int64_t token = begin; token < end; ++token) {
    const StripRows<T, N, Branch> rows(norm, token, hidden);
    Pack<T, N> upstream[kKept], value[kKept];
    float dot = 0.0f;
#pragma unroll
    for (int p = 0; p < kKept; ++p) {
      const int64_t j = column_of(p, N);
      if (j < hidden) {
        upstream[p] = load<T, N>(rows.dout + j);
        value[p] = load<T, N>(rows.x + j);
        dot += rows.dot(norm, j, upstream[p], value[p]);
      }
    }
#pragma unroll 1
    for (int64_t j = column_of(kKept, N); j < hidden; j += kThreads * N) {
      dot += rows.dot(norm, j, load<T, N>(rows.dout + j), load<T, N>(rows.x + j));
    }
    const float r = norm.r[token];
    const float pull = r * r * r / live * block_sum(dot);
#pragma unroll
    for (int p = 0; p < kKept; ++p) {
      const int64_t j = column_of(p, N);
      if (j < hidden) rows.give(norm, j, upstream[p], value[p], r, pull, kept_sums[p]);
    }
#pragma unroll 1
    for (int64_t j = column_of(kKept, N); j < hidden; j += kThreads * N) {
      Sums sums;
      read_sums(sums, column, branch_column, j);
      rows.give(norm, j, load<T, N>(rows.dout + j), load<T, N>(rows.x + j), r, pull, sums);
      write_sums(sums, column, branch_column, j);
    }
  }
#pragma unroll
  for (int p = 0; p < kKept; ++p) {
    if (column_of(p, N) < hidden) write_sums(kept_sums[p], column, branch_column, column_of(p, N));
  }
}

__global__ void column_gradient_kernel(NormBackward norm, int64_t strips, int64_t hidden) {
  const bool branch = norm.dbranch_mask != nullptr;
  const float sum = strip_sum(norm.partial, strips, hidden);
  const float branch_sum = branch ? strip_sum(norm.partial + strips * hidden, strips, hidden) : 0.0f;
  const int64_t j = strip_sum_column();
  if (j >= hidden || !gives_strip_sum()) return;
  norm.dweight[j] = norm.mask == nullptr ? sum : sum * norm.mask[j];
  if (norm.mask != nullptr) norm.dmask[j] = sum * norm.weight[j];
  if (branch) norm.dbranch_mask[j] = branch_sum;
}

// ---- launchers of one type ------------------------------------------------------------------------------------------

template <typename T, bool Add>
void forward_any(const NormForward& norm, int64_t tokens, int64_t hidden, cudaStream_t stream) {
  const bool fits = packs_fit<T>(hidden | norm.x_row | norm.branch_row, norm.x, norm.branch, norm.branch_mask,
                                 norm.weight, norm.mask, norm.sum, norm.out);
  const auto kernel = fits ? forward_kernel<T, 16 / sizeof(T), Add> : forward_kernel<T, 1, Add>;
  kernel<<<blocks_for(tokens, 1), kThreads, 0, stream>>>(norm, tokens, hidden);
}

template <typename T, bool Branch>
void backward_any(const NormBackward& norm, int64_t tokens, int64_t hidden, cudaStream_t stream) {
  const bool fits = packs_fit<T>(hidden | norm.dout_row | norm.dsum_row | norm.x_row | norm.branch_row, norm.dout,
                                 norm.dsum, norm.x, norm.branch, norm.branch_mask, norm.weight, norm.mask, norm.dx,
                                 norm.dbranch, norm.partial);
  const auto kernel = fits ? backward_kernel<T, 16 / sizeof(T), Branch> : backward_kernel<T, 1, Branch>;
  kernel<<<blocks_for(strip_count(tokens), 1), kThreads, 0, stream>>>(norm, tokens, hidden, strip_tokens(tokens));
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void masked_rms_norm_forward(const NormForward& norm, int64_t tokens, int64_t hidden, Dtype dtype, intptr_t executor) {
  if (tokens == 0) return;
  by_dtype(dtype, [&](auto element) {
    const auto launch = norm.branch == nullptr ? forward_any<decltype(element), false>
                                               : forward_any<decltype(element), true>;
    launch(norm, tokens, hidden, stream_of(executor));
  });
  check_launch("masked_rms_norm forward");
}

void masked_rms_norm_backward(const NormBackward& norm, int64_t tokens, int64_t hidden, Dtype dtype,
                              intptr_t executor) {
  if (hidden == 0) return;
  const cudaStream_t stream = stream_of(executor);
  if (tokens > 0) {
    by_dtype(dtype, [&](auto element) {
      const auto launch = norm.dbranch_mask == nullptr ? backward_any<decltype(element), false>
                                                 : backward_any<decltype(element), true>;
      launch(norm, tokens, hidden, stream);
    });
  }
  column_gradient_kernel<<<blocks_for(hidden, kColumns), kThreads, 0, stream>>>(norm, strip_count(tokens), hidden);
  check_launch("masked_rms_norm backward");
}

}  // namespace megashear
