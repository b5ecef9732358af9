// cuda.cu: masked SwiGLU on CUDA.
//
// Forward: a thread owns one pack of columns of one row. Backward: a thread owns one pack of columns of a strip of rows
// and keeps the mask's gradient in registers; a second kernel adds the strips in order.
#include "../cuda_launch.cuh"
#include "masked_swiglu.h"

namespace megashear {
namespace {

// ---- kernels --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t own_column(int width) {
  return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * width;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* gate_up, int64_t gate_up_row, const float* mask, T* out, int64_t tokens, int64_t features) {
  const int64_t column = own_column(N);
  if (column >= features) return;
  float m[N];
  load_mask<N>(m, mask, column);
  for (int64_t token = blockIdx.y; token < tokens; token += gridDim.y) {
    const Pack<T, N> gate = load<T, N>(gate_up + token * gate_up_row + column);
    const Pack<T, N> up = load<T, N>(gate_up + token * gate_up_row + features + column);
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      result.value[i] = narrow<T>(masked_swiglu(widen(gate.value[i]), widen(up.value[i]), m[i]));
    }
    store<T, N>(out + token * features + column, result);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* dout, int64_t dout_row, const T* gate_up, int64_t gate_up_row, const float* mask,
                    T* dgate_up, float* partial, int64_t tokens, int64_t features, int64_t strip_size) {
  const int64_t column = own_column(N);
  if (column >= features) return;
  const int64_t begin = blockIdx.y * strip_size;
  const int64_t end = begin + strip_size < tokens ? begin + strip_size : tokens;
  float m[N], dmask[N];
  load_mask<N>(m, mask, column);
#pragma unroll
  for (int i = 0; i < N; ++i) dmask[i] = 0.0f;
  for (int64_t token = begin; token < end; ++token) {
    const T* source = gate_up + token * gate_up_row + column;
    T* target = dgate_up + token * 2 * features + column;
    const Pack<T, N> upstream = load<T, N>(dout + token * dout_row + column);
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
  if (partial != nullptr) store_floats<N>(partial + blockIdx.y * features + column, dmask);
}

__global__ void mask_gradient_kernel(const float* partial, float* dmask, int64_t strips, int64_t features) {
  const float sum = strip_sum(partial, strips, features);
  if (strip_sum_column() < features && gives_strip_sum()) dmask[strip_sum_column()] = sum;
}

// ---- launchers of one type ------------------------------------------------------------------------------------------

constexpr int64_t kMostRows = 65535;  // of a grid's second dimension

template <typename T>
void forward_any(const void* gate_up, int64_t gate_up_row, const float* mask, void* out, int64_t tokens,
                 int64_t features, cudaStream_t stream) {
  constexpr int wide = 16 / sizeof(T);
  const bool fits = packs_fit<T>(features | gate_up_row, gate_up, mask, out);
  const auto kernel = fits ? forward_kernel<T, wide> : forward_kernel<T, 1>;
  const dim3 grid(blocks_for(features, kThreads * (fits ? wide : 1)), blocks_for(tokens, 1, kMostRows));
  kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(gate_up), gate_up_row, mask, static_cast<T*>(out), tokens,
                                        features);
}

template <typename T>
void backward_any(const void* dout, int64_t dout_row, const void* gate_up, int64_t gate_up_row, const float* mask,
                  void* dgate_up, float* partial, int64_t tokens, int64_t features, cudaStream_t stream) {
  constexpr int wide = 16 / sizeof(T);
  const bool fits = packs_fit<T>(features | gate_up_row | dout_row, dout, gate_up, mask, dgate_up, partial);
  const auto kernel = fits ? backward_kernel<T, wide> : backward_kernel<T, 1>;
  const dim3 grid(blocks_for(features, kThreads * (fits ? wide : 1)), static_cast<unsigned>(strip_count(tokens)));
  kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(dout), dout_row, static_cast<const T*>(gate_up),
                                        gate_up_row, mask, static_cast<T*>(dgate_up), partial, tokens, features,
                                        strip_tokens(tokens));
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void masked_swiglu_forward(const void* gate_up, int64_t gate_up_row, const float* mask, void* out, int64_t tokens,
                           int64_t features, Dtype dtype, intptr_t executor) {
  if (tokens * features == 0) return;
  by_dtype(dtype, [&](auto element) {
    forward_any<decltype(element)>(gate_up, gate_up_row, mask, out, tokens, features, stream_of(executor));
  });
  check_launch("masked_swiglu forward");
}

void masked_swiglu_backward(const void* dout, int64_t dout_row, const void* gate_up, int64_t gate_up_row,
                            const float* mask, void* dgate_up, float* dmask, float* partial, int64_t tokens,
                            int64_t features, Dtype dtype, intptr_t executor) {
  if (features == 0) return;
  const cudaStream_t stream = stream_of(executor);
  if (tokens > 0) {
    by_dtype(dtype, [&](auto element) {
      backward_any<decltype(element)>(dout, dout_row, gate_up, gate_up_row, mask, dgate_up, partial, tokens, features,
                                      stream);
    });
  }
  if (mask != nullptr) {
    mask_gradient_kernel<<<blocks_for(features, kColumns), kThreads, 0, stream>>>(partial, dmask, strip_count(tokens),
                                                                                  features);
  }
  check_launch("masked_swiglu backward");
}

}  // namespace megashear
