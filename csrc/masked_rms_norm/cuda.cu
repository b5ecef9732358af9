// cuda.cu: masked RMSNorm on CUDA.
//
// Forward: one block per token, which counts the live dimensions while it sums the squares. Backward: one block per
// strip of tokens; a thread owns fixed columns, whose sums stay in shared memory where they fit, else in the strip's
// row of `partial`; a second kernel adds the strips in order and makes the gradients of weight and mask.
#include "../cuda_launch.cuh"
#include "masked_rms_norm.h"

namespace megashear {
namespace {

constexpr int64_t kSharedColumns = 10240;  // 40 KiB of sums, within what every device gives a block without asking

// ---- kernels --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float mask_at(const float* mask, int64_t column) {
  return mask == nullptr ? 1.0f : mask[column];
}

template <typename T, int N>
__global__ void forward_kernel(const T* x, const float* weight, const float* mask, T* out, float* r, float eps,
                               int64_t hidden) {
  const T* source = x + blockIdx.x * hidden;
  T* target = out + blockIdx.x * hidden;
  float square = 0.0f, live = 0.0f;
  for (int64_t j = threadIdx.x * N; j < hidden; j += kThreads * N) {
    const Pack<T, N> pack = load<T, N>(source + j);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float m = mask_at(mask, j + i);
      const float value = live_or_zero(widen(pack.value[i]), m);
      square += value * value;
      live += m != 0.0f ? 1.0f : 0.0f;
    }
  }
  square = block_sum(square);
  live = block_sum(live);
  const float scale = 1.0f / sqrtf(square / fmaxf(live, 1.0f) + eps);
  if (threadIdx.x == 0) r[blockIdx.x] = scale;
  for (int64_t j = threadIdx.x * N; j < hidden; j += kThreads * N) {
    Pack<T, N> pack = load<T, N>(source + j);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float h = normalised<T>(widen(pack.value[i]), scale);
      pack.value[i] = narrow<T>(masked_rms_norm(h, weight[j + i], mask_at(mask, j + i)));
    }
    store<T, N>(target + j, pack);
  }
}

template <typename T, int N>
__global__ void backward_kernel(const T* dout, const T* x, const float* weight, const float* mask, const float* r,
                                T* dx, float* partial, int64_t tokens, int64_t hidden, int64_t strip_size) {
  extern __shared__ float shared_column[];
  float* row = partial + blockIdx.x * hidden;
  float* column = hidden <= kSharedColumns ? shared_column : row;
  float live = 0.0f;
  for (int64_t j = threadIdx.x * N; j < hidden; j += kThreads * N) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      column[j + i] = 0.0f;
      live += mask_at(mask, j + i) != 0.0f ? 1.0f : 0.0f;
    }
  }
  live = fmaxf(block_sum(live), 1.0f);
  const int64_t begin = blockIdx.x * strip_size;
  const int64_t end = begin + strip_size < tokens ? begin + strip_size : tokens;
  for (int64_t token = begin; token < end; ++token) {
    const T* upstream = dout + token * hidden;
    const T* source = x + token * hidden;
    float dot = 0.0f;
    for (int64_t j = threadIdx.x * N; j < hidden; j += kThreads * N) {
      const Pack<T, N> d = load<T, N>(upstream + j), value = load<T, N>(source + j);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dot += widen(d.value[i]) * weight[j + i] * mask_at(mask, j + i) * widen(value.value[i]);
      }
    }
    const float scale = r[token];
    const float pull = scale * scale * scale / live * block_sum(dot);
    for (int64_t j = threadIdx.x * N; j < hidden; j += kThreads * N) {
      const Pack<T, N> d = load<T, N>(upstream + j), value = load<T, N>(source + j);
      Pack<T, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float slope = widen(d.value[i]), at = widen(value.value[i]);
        result.value[i] =
            narrow<T>(masked_rms_norm_dx(slope, at, weight[j + i], mask_at(mask, j + i), scale, pull));
        column[j + i] += slope * normalised<T>(at, scale);
      }
      store<T, N>(dx + token * hidden + j, result);
    }
  }
  if (column == row) return;
  for (int64_t j = threadIdx.x * N; j < hidden; j += kThreads * N) {
#pragma unroll
    for (int i = 0; i < N; ++i) row[j + i] = column[j + i];
  }
}

__global__ void column_gradient_kernel(const float* partial, const float* weight, const float* mask, float* dweight,
                                       float* dmask, int64_t strips, int64_t hidden) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= hidden) return;
  float sum = 0.0f;
  for (int64_t strip = 0; strip < strips; ++strip) sum += partial[strip * hidden + j];
  dweight[j] = sum * mask_at(mask, j);
  if (mask != nullptr) dmask[j] = sum * weight[j];
}

// ---- launchers of one type ------------------------------------------------------------------------------------------

template <typename T>
void forward_any(const void* x, const float* weight, const float* mask, void* out, float* r, float eps, int64_t tokens,
                 int64_t hidden, cudaStream_t stream) {
  constexpr int wide = 16 / sizeof(T);
  const auto kernel = packs_fit<T>(hidden, x, out, out) ? forward_kernel<T, wide> : forward_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(static_cast<const T*>(x), weight, mask,
                                                                 static_cast<T*>(out), r, eps, hidden);
}

template <typename T>
void backward_any(const void* dout, const void* x, const float* weight, const float* mask, const float* r, void* dx,
                  float* partial, int64_t tokens, int64_t hidden, cudaStream_t stream) {
  constexpr int wide = 16 / sizeof(T);
  const auto kernel = packs_fit<T>(hidden, dout, x, dx) ? backward_kernel<T, wide> : backward_kernel<T, 1>;
  const size_t shared = hidden <= kSharedColumns ? static_cast<size_t>(hidden) * sizeof(float) : 0;
  kernel<<<static_cast<unsigned>(strip_count(tokens)), kThreads, shared, stream>>>(
      static_cast<const T*>(dout), static_cast<const T*>(x), weight, mask, r, static_cast<T*>(dx), partial, tokens,
      hidden, strip_tokens(tokens));
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void masked_rms_norm_forward(const void* x, const float* weight, const float* mask, void* out, float* r, float eps,
                             int64_t tokens, int64_t hidden, Dtype dtype, intptr_t executor) {
  if (tokens == 0) return;
  if (dtype == Dtype::Float32) {
    forward_any<float>(x, weight, mask, out, r, eps, tokens, hidden, stream_of(executor));
  } else {
    forward_any<BFloat16>(x, weight, mask, out, r, eps, tokens, hidden, stream_of(executor));
  }
  check_launch("masked_rms_norm forward");
}

void masked_rms_norm_backward(const void* dout, const void* x, const float* weight, const float* mask, const float* r,
                              void* dx, float* dweight, float* dmask, float* partial, int64_t tokens, int64_t hidden,
                              Dtype dtype, intptr_t executor) {
  if (hidden == 0) return;
  const cudaStream_t stream = stream_of(executor);
  if (tokens > 0 && dtype == Dtype::Float32) {
    backward_any<float>(dout, x, weight, mask, r, dx, partial, tokens, hidden, stream);
  } else if (tokens > 0) {
    backward_any<BFloat16>(dout, x, weight, mask, r, dx, partial, tokens, hidden, stream);
  }
  column_gradient_kernel<<<blocks_for(hidden, kThreads), kThreads, 0, stream>>>(partial, weight, mask, dweight, dmask,
                                                                                strip_count(tokens), hidden);
  check_launch("masked_rms_norm backward");
}

}  // namespace megashear
