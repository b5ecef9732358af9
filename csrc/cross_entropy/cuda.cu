// cuda.cu: cross entropy on CUDA; one block per token, which reads its row once forward and rewrites it once backward.
#include <cmath>

#include "../cuda_launch.cuh"
#include "cross_entropy.h"

namespace megashear {
namespace {

// ---- kernels --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float block_max(float value) {
  __shared__ float warp_peaks[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  __syncthreads();  // the previous use of warp_peaks is over
  if (threadIdx.x % 32 == 0) warp_peaks[threadIdx.x / 32] = value;
  __syncthreads();
  float peak = warp_peaks[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) peak = fmaxf(peak, warp_peaks[warp]);
  return peak;
}

// N columns at once where rows allow it; columns beyond the last are left out element by element.
template <typename T, int N>
__global__ void forward_kernel(const T* logits, const int64_t* labels, float* log_sum, float* label_logit,
                               int64_t width, int64_t columns, int64_t first) {
  const T* row = logits + blockIdx.x * width;
  ExponentialSum part{-INFINITY, 0.0f};
  for (int64_t v = threadIdx.x * N; v < columns; v += kThreads * N) {
    const Pack<T, N> pack = load<T, N>(row + v);
    float peak = part.peak;
#pragma unroll
    for (int i = 0; i < N; ++i) peak = v + i < columns ? fmaxf(peak, widen(pack.value[i])) : peak;
    float sum = peak > part.peak ? rescaled(part, peak) : part.sum;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v + i < columns ? exponential(widen(pack.value[i]) - peak) : 0.0f;
    part = {peak, sum};
  }
  const float peak = block_max(part.peak);
  const float sum = block_sum(rescaled(part, peak));
  if (threadIdx.x != 0) return;
  const int64_t label = labels[blockIdx.x] - first;
  log_sum[blockIdx.x] = peak + logf(sum);
  label_logit[blockIdx.x] = label >= 0 && label < columns ? widen(row[label]) : 0.0f;
}

template <typename T, int N>
__global__ void backward_kernel(T* logits, const int64_t* labels, const float* log_sum, const float* dlog_sum,
                                const float* dlabel_logit, int64_t width, int64_t columns, int64_t first) {
  T* row = logits + blockIdx.x * width;
  const int64_t label = labels[blockIdx.x] - first;
  const float total = log_sum[blockIdx.x], dtotal = dlog_sum[blockIdx.x], dlabel = dlabel_logit[blockIdx.x];
  for (int64_t v = threadIdx.x * N; v < width; v += kThreads * N) {
    Pack<T, N> pack = load<T, N>(row + v);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = cross_entropy_gradient(widen(pack.value[i]), total, dtotal, v + i == label ? dlabel : 0.0f);
      pack.value[i] = narrow<T>(v + i < columns ? d : 0.0f);
    }
    store<T, N>(row + v, pack);
  }
}

// ---- launchers of one type ------------------------------------------------------------------------------------------

template <typename T>
void forward(const T* source, const int64_t* labels, float* log_sum, float* label_logit, int64_t tokens, int64_t width,
             int64_t columns, int64_t first, cudaStream_t stream) {
  const unsigned blocks = blocks_for(tokens, 1);
  if (packs_fit<T>(width, source, source, source)) {
    forward_kernel<T, 16 / sizeof(T)>
        <<<blocks, kThreads, 0, stream>>>(source, labels, log_sum, label_logit, width, columns, first);
  } else {
    forward_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(source, labels, log_sum, label_logit, width, columns, first);
  }
}

template <typename T>
void backward(T* target, const int64_t* labels, const float* log_sum, const float* dlog_sum, const float* dlabel_logit,
              int64_t tokens, int64_t width, int64_t columns, int64_t first, cudaStream_t stream) {
  const unsigned blocks = blocks_for(tokens, 1);
  if (packs_fit<T>(width, target, target, target)) {
    backward_kernel<T, 16 / sizeof(T)>
        <<<blocks, kThreads, 0, stream>>>(target, labels, log_sum, dlog_sum, dlabel_logit, width, columns, first);
  } else {
    backward_kernel<T, 1>
        <<<blocks, kThreads, 0, stream>>>(target, labels, log_sum, dlog_sum, dlabel_logit, width, columns, first);
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void cross_entropy_forward(const void* logits, const int64_t* labels, float* log_sum, float* label_logit,
                           int64_t tokens, int64_t width, int64_t columns, int64_t first, Dtype dtype,
                           intptr_t executor) {
  if (tokens == 0) return;
  by_dtype(dtype, [&](auto element) {
    const auto* source = static_cast<const decltype(element)*>(logits);
    forward(source, labels, log_sum, label_logit, tokens, width, columns, first, stream_of(executor));
  });
  check_launch("cross_entropy forward");
}

void cross_entropy_backward(void* logits, const int64_t* labels, const float* log_sum, const float* dlog_sum,
                            const float* dlabel_logit, int64_t tokens, int64_t width, int64_t columns, int64_t first,
                            Dtype dtype, intptr_t executor) {
  if (tokens * width == 0) return;
  by_dtype(dtype, [&](auto element) {
    auto* target = static_cast<decltype(element)*>(logits);
    backward(target, labels, log_sum, dlog_sum, dlabel_logit, tokens, width, columns, first, stream_of(executor));
  });
  check_launch("cross_entropy backward");
}

}  // namespace megashear
