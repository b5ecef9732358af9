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

MEGASHEAR_MULTIVERSION void forward_one(const float* gate_up, const float* mask, float* out, int64_t features) {
  forward_row(gate_up, mask, out, features);
}
MEGASHEAR_MULTIVERSION void forward_one(const BFloat16* gate_up, const float* mask, BFloat16* out, int64_t features) {
  forward_row(gate_up, mask, out, features);
}
MEGASHEAR_MULTIVERSION void forward_one(const Float16* gate_up, const float* mask, Float16* out, int64_t features) {
  forward_row(gate_up, mask, out, features);
}
MEGASHEAR_MULTIVERSION void backward_one(const float* dout, const float* gate_up, const float* mask, float* dgate_up,
                                         float* dmask, int64_t features) {
  backward_row(dout, gate_up, mask, dgate_up, dmask, features);
}
MEGASHEAR_MULTIVERSION void backward_one(const BFloat16* dout, const BFloat16* gate_up, const float* mask,
                                         BFloat16* dgate_up, float* dmask, int64_t features) {
  backward_row(dout, gate_up, mask, dgate_up, dmask, features);
}
MEGASHEAR_MULTIVERSION void backward_one(const Float16* dout, const Float16* gate_up, const float* mask,
                                         Float16* dgate_up, float* dmask, int64_t features) {
  backward_row(dout, gate_up, mask, dgate_up, dmask, features);
}

// ---- loops over rows ------------------------------------------------------------------------------------------------

template <typename T>
void forward(const void* gate_up, int64_t gate_up_row, const float* mask, void* out, int64_t tokens, int64_t features,
             intptr_t executor) {
  const T* source = static_cast<const T*>(gate_up);
  T* target = static_cast<T*>(out);
#pragma omp parallel for num_threads(parallel_threads(executor, tokens * features)) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) forward_one(source + t * gate_up_row, mask, target + t * features, features);
}

template <typename T>
void backward(const void* dout, int64_t dout_row, const void* gate_up, int64_t gate_up_row, const float* mask,
              void* dgate_up, float* partial, int64_t tokens, int64_t features, intptr_t executor) {
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
      backward_one(upstream + t * dout_row, source + t * gate_up_row, mask, target + t * 2 * features, sums, features);
    }
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void masked_swiglu_forward(const void* gate_up, int64_t gate_up_row, const float* mask, void* out, int64_t tokens,
                           int64_t features, Dtype dtype, intptr_t executor) {
  by_dtype(dtype, [&](auto element) {
    forward<decltype(element)>(gate_up, gate_up_row, mask, out, tokens, features, executor);
  });
}

void masked_swiglu_backward(const void* dout, int64_t dout_row, const void* gate_up, int64_t gate_up_row,
                            const float* mask, void* dgate_up, float* dmask, float* partial, int64_t tokens,
                            int64_t features, Dtype dtype, intptr_t executor) {
  by_dtype(dtype, [&](auto element) {
    backward<decltype(element)>(dout, dout_row, gate_up, gate_up_row, mask, dgate_up, partial, tokens, features,
                                executor);
  });
  if (mask != nullptr) {
    sum_strips(partial, dmask, strip_count(tokens), features, parallel_threads(executor, tokens * features));
  }
}

}  // namespace megashear
