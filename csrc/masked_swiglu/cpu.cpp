// cpu.cpp: masked SwiGLU on the CPU; threads share the rows forward and the strips of rows backward.
#include "../parallel_cpu.h"
#include "masked_swiglu.h"

namespace megashear {
namespace {

// ---- kernels of one row ---------------------------------------------------------------------------------------------

template <typename T>
MEGASHEAR_ROW void forward_row(const T* __restrict gate_up, const float* __restrict mask, T* __restrict out,
                               int64_t features) {
  const T* up = gate_up + features;
  if (mask == nullptr) {
#pragma omp simd
    for (int64_t f = 0; f < features; ++f) {
      out[f] = narrow<T>(masked_swiglu(widen(gate_up[f]), widen(up[f]), 1.0f));
    }
  } else {
#pragma omp simd
    for (int64_t f = 0; f < features; ++f) {
      out[f] = narrow<T>(masked_swiglu(widen(gate_up[f]), widen(up[f]), mask[f]));
    }
  }
}

template <typename T>
MEGASHEAR_ROW void backward_row(const T* __restrict dout, const T* __restrict gate_up, const float* __restrict mask,
                                T* __restrict dgate_up, float* __restrict dmask, int64_t features) {
  const T* up = gate_up + features;
  T* dup = dgate_up + features;
  if (mask == nullptr) {
#pragma omp simd
    for (int64_t f = 0; f < features; ++f) {
      const SwigluGradient d = masked_swiglu_gradient(widen(dout[f]), widen(gate_up[f]), widen(up[f]), 1.0f);
      dgate_up[f] = narrow<T>(d.gate);
      dup[f] = narrow<T>(d.up);
    }
  } else {
#pragma omp simd
    for (int64_t f = 0; f < features; ++f) {
      const SwigluGradient d = masked_swiglu_gradient(widen(dout[f]), widen(gate_up[f]), widen(up[f]), mask[f]);
      dgate_up[f] = narrow<T>(d.gate);
      dup[f] = narrow<T>(d.up);
      dmask[f] += d.mask;
    }
  }
}

MEGASHEAR_MULTIVERSION void forward_fp32(const float* gate_up, const float* mask, float* out, int64_t features) {
  forward_row(gate_up, mask, out, features);
}
MEGASHEAR_MULTIVERSION void forward_bf16(const BFloat16* gate_up, const float* mask, BFloat16* out, int64_t features) {
  forward_row(gate_up, mask, out, features);
}
MEGASHEAR_MULTIVERSION void backward_fp32(const float* dout, const float* gate_up, const float* mask, float* dgate_up,
                                          float* dmask, int64_t features) {
  backward_row(dout, gate_up, mask, dgate_up, dmask, features);
}
MEGASHEAR_MULTIVERSION void backward_bf16(const BFloat16* dout, const BFloat16* gate_up, const float* mask,
                                          BFloat16* dgate_up, float* dmask, int64_t features) {
  backward_row(dout, gate_up, mask, dgate_up, dmask, features);
}

// ---- loops over rows ------------------------------------------------------------------------------------------------

template <typename T, typename Row>
void forward(Row row, const void* gate_up, const float* mask, void* out, int64_t tokens, int64_t features,
             intptr_t executor) {
  const T* source = static_cast<const T*>(gate_up);
  T* target = static_cast<T*>(out);
#pragma omp parallel for num_threads(parallel_threads(executor, tokens * features)) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) row(source + t * 2 * features, mask, target + t * features, features);
}

template <typename T, typename Row>
void backward(Row row, const void* dout, const void* gate_up, const float* mask, void* dgate_up, float* partial,
              int64_t tokens, int64_t features, intptr_t executor) {
  const T* upstream = static_cast<const T*>(dout);
  const T* source = static_cast<const T*>(gate_up);
  T* target = static_cast<T*>(dgate_up);
  const int64_t strip_size = strip_tokens(tokens);
#pragma omp parallel for num_threads(parallel_threads(executor, tokens * features)) schedule(static)
  for (int64_t strip = 0; strip < strip_count(tokens); ++strip) {
    float* sums = mask == nullptr ? nullptr : partial + strip * features;
    if (sums != nullptr) std::memset(sums, 0, static_cast<size_t>(features) * sizeof(float));
    const int64_t end = (strip + 1) * strip_size < tokens ? (strip + 1) * strip_size : tokens;
    for (int64_t t = strip * strip_size; t < end; ++t) {
      row(upstream + t * features, source + t * 2 * features, mask, target + t * 2 * features, sums, features);
    }
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void masked_swiglu_forward(const void* gate_up, const float* mask, void* out, int64_t tokens, int64_t features,
                           Dtype dtype, intptr_t executor) {
  if (dtype == Dtype::Float32) {
    forward<float>(forward_fp32, gate_up, mask, out, tokens, features, executor);
  } else {
    forward<BFloat16>(forward_bf16, gate_up, mask, out, tokens, features, executor);
  }
}

void masked_swiglu_backward(const void* dout, const void* gate_up, const float* mask, void* dgate_up, float* dmask,
                            float* partial, int64_t tokens, int64_t features, Dtype dtype, intptr_t executor) {
  if (dtype == Dtype::Float32) {
    backward<float>(backward_fp32, dout, gate_up, mask, dgate_up, partial, tokens, features, executor);
  } else {
    backward<BFloat16>(backward_bf16, dout, gate_up, mask, dgate_up, partial, tokens, features, executor);
  }
  if (mask != nullptr) {
    sum_strips(partial, dmask, strip_count(tokens), features, parallel_threads(executor, tokens * features));
  }
}

}  // namespace megashear
