// cuda.cu: masked SwiGLU on CUDA.
//
// Forward: a thread owns one pack of columns of one row. Backward: a thread owns one pack of columns of a strip of rows
// and keeps the mask's gradient in registers; a second kernel adds the strips in order.
#include "../cuda_launch.cuh"
#include "masked_swiglu.h"

namespace megashear {
namespace {

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename T, int N>
__global__ void forward_kernel(const T* gate_up, const float* mask, T* out, int64_t tokens, int64_t features) {
  const int64_t packs = features / N;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= tokens * packs) return;
  const int64_t token = index / packs, column = (index % packs) * N;
  const Pack<T, N> gate = load<T, N>(gate_up + token * 2 * features + column);
  const Pack<T, N> up = load<T, N>(gate_up + token * 2 * features + features + column);
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float m = mask == nullptr ? 1.0f : mask[column + i];
    result.value[i] = narrow<T>(masked_swiglu(widen(gate.value[i]), widen(up.value[i]), m));
  }
  store<T, N>(out + token * features + column, result);
}

template <typename T, int N>
__global__ void backward_kernel(const T* dout, const T* gate_up, const float* mask, T* dgate_up, float* partial,
                                int64_t tokens, int64_t features, int64_t strip_size) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (column >= features) return;
  const int64_t begin = blockIdx.y * strip_size;
  const int64_t end = begin + strip_size < tokens ? begin + strip_size : tokens;
  float m[N], dmask[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    m[i] = mask == nullptr ? 1.0f : mask[column + i];
    dmask[i] = 0.0f;
  }
  for (int64_t token = begin; token < end; ++token) {
    const T* source = gate_up + token * 2 * features + column;
    T* target = dgate_up + token * 2 * features + column;
    const Pack<T, N> upstream = load<T, N>(dout + token * features + column);
    const Pack<T, N> gate = load<T, N>(source);
    const Pack<T, N> up = load<T, N>(source + features);
    Pack<T, N> dgate, dup;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const SwigluGradient d =
          masked_swiglu_gradient(widen(upstream.value[i]), widen(gate.value[i]), widen(up.value[i]), m[i]);
      dgate.value[i] = narrow<T>(d.gate);
      dup.value[i] = narrow<T>(d.up);
      dmask[i] += d.mask;
    }
    store<T, N>(target, dgate);
    store<T, N>(target + features, dup);
  }
  if (partial == nullptr) return;
#pragma unroll
  for (int i = 0; i < N; ++i) partial[blockIdx.y * features + column + i] = dmask[i];
}

__global__ void mask_gradient_kernel(const float* partial, float* dmask, int64_t strips, int64_t features) {
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (f >= features) return;
  float sum = 0.0f;
  for (int64_t strip = 0; strip < strips; ++strip) sum += partial[strip * features + f];
  dmask[f] = sum;
}

// ---- launchers of one type ------------------------------------------------------------------------------------------

template <typename T, int N>
void forward(const T* gate_up, const float* mask, T* out, int64_t tokens, int64_t features, cudaStream_t stream) {
  const unsigned blocks = blocks_for(tokens * (features / N), kThreads);
  forward_kernel<T, N><<<blocks, kThreads, 0, stream>>>(gate_up, mask, out, tokens, features);
}

template <typename T, int N>
void backward(const T* dout, const T* gate_up, const float* mask, T* dgate_up, float* partial, int64_t tokens,
              int64_t features, cudaStream_t stream) {
  const dim3 grid(blocks_for(features / N, kThreads), static_cast<unsigned>(strip_count(tokens)));
  backward_kernel<T, N>
      <<<grid, kThreads, 0, stream>>>(dout, gate_up, mask, dgate_up, partial, tokens, features, strip_tokens(tokens));
}

template <typename T>
void forward_any(const void* gate_up, const float* mask, void* out, int64_t tokens, int64_t features,
                 cudaStream_t stream) {
  const T* source = static_cast<const T*>(gate_up);
  T* target = static_cast<T*>(out);
  if (packs_fit<T>(features, source, target, target)) {
    forward<T, 16 / sizeof(T)>(source, mask, target, tokens, features, stream);
  } else {
    forward<T, 1>(source, mask, target, tokens, features, stream);
  }
}

template <typename T>
void backward_any(const void* dout, const void* gate_up, const float* mask, void* dgate_up, float* partial,
                  int64_t tokens, int64_t features, cudaStream_t stream) {
  const T* upstream = static_cast<const T*>(dout);
  const T* source = static_cast<const T*>(gate_up);
  T* target = static_cast<T*>(dgate_up);
  if (packs_fit<T>(features, upstream, source, target)) {
    backward<T, 16 / sizeof(T)>(upstream, source, mask, target, partial, tokens, features, stream);
  } else {
    backward<T, 1>(upstream, source, mask, target, partial, tokens, features, stream);
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void masked_swiglu_forward(const void* gate_up, const float* mask, void* out, int64_t tokens, int64_t features,
                           Dtype dtype, intptr_t executor) {
  if (tokens * features == 0) return;
  if (dtype == Dtype::Float32) {
    forward_any<float>(gate_up, mask, out, tokens, features, stream_of(executor));
  } else {
    forward_any<BFloat16>(gate_up, mask, out, tokens, features, stream_of(executor));
  }
  check_launch("masked_swiglu forward");
}

void masked_swiglu_backward(const void* dout, const void* gate_up, const float* mask, void* dgate_up, float* dmask,
                            float* partial, int64_t tokens, int64_t features, Dtype dtype, intptr_t executor) {
  if (features == 0) return;
  const cudaStream_t stream = stream_of(executor);
  if (tokens > 0 && dtype == Dtype::Float32) {
    backward_any<float>(dout, gate_up, mask, dgate_up, partial, tokens, features, stream);
  } else if (tokens > 0) {
    backward_any<BFloat16>(dout, gate_up, mask, dgate_up, partial, tokens, features, stream);
  }
  if (mask != nullptr) {
    mask_gradient_kernel<<<blocks_for(features, kThreads), kThreads, 0, stream>>>(partial, dmask, strip_count(tokens),
                                                                                  features);
  }
  check_launch("masked_swiglu backward");
}

}  // namespace megashear
