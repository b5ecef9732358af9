// cpu.cpp: masked RMSNorm on the CPU; threads share the rows forward and the strips of rows backward.
#include <cmath>
#include <vector>

#include "../parallel_cpu.h"
#include "masked_rms_norm.h"

namespace megashear {
namespace {

// ---- kernels of one row; the mask is never null here ----------------------------------------------------------------

template <typename T>
MEGASHEAR_ROW float forward_row(const T* __restrict x, const float* __restrict weight, const float* __restrict mask,
                                T* __restrict out, float eps, float live, int64_t hidden) {
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t j = 0; j < hidden; ++j) {
    const float value = live_or_zero(widen(x[j]), mask[j]);
    square += value * value;
  }
  const float r = 1.0f / std::sqrt(square / live + eps);
#pragma omp simd
  for (int64_t j = 0; j < hidden; ++j) {
    out[j] = narrow<T>(masked_rms_norm(normalised<T>(widen(x[j]), r), weight[j], mask[j]));
  }
  return r;
}

template <typename T>
MEGASHEAR_ROW void backward_row(const T* __restrict dout, const T* __restrict x, const float* __restrict weight,
                                const float* __restrict mask, float r, float live, T* __restrict dx,
                                float* __restrict column, int64_t hidden) {
  float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < hidden; ++j) dot += widen(dout[j]) * weight[j] * mask[j] * widen(x[j]);
  const float pull = r * r * r / live * dot;
#pragma omp simd
  for (int64_t j = 0; j < hidden; ++j) {
    const float upstream = widen(dout[j]), value = widen(x[j]);
    dx[j] = narrow<T>(masked_rms_norm_dx(upstream, value, weight[j], mask[j], r, pull));
    column[j] += upstream * normalised<T>(value, r);
  }
}

MEGASHEAR_MULTIVERSION float forward_fp32(const float* x, const float* weight, const float* mask, float* out, float eps,
                                          float live, int64_t hidden) {
  return forward_row(x, weight, mask, out, eps, live, hidden);
}
MEGASHEAR_MULTIVERSION float forward_bf16(const BFloat16* x, const float* weight, const float* mask, BFloat16* out,
                                          float eps, float live, int64_t hidden) {
  return forward_row(x, weight, mask, out, eps, live, hidden);
}
MEGASHEAR_MULTIVERSION void backward_fp32(const float* dout, const float* x, const float* weight, const float* mask,
                                          float r, float live, float* dx, float* column, int64_t hidden) {
  backward_row(dout, x, weight, mask, r, live, dx, column, hidden);
}
MEGASHEAR_MULTIVERSION void backward_bf16(const BFloat16* dout, const BFloat16* x, const float* weight,
                                          const float* mask, float r, float live, BFloat16* dx, float* column,
                                          int64_t hidden) {
  backward_row(dout, x, weight, mask, r, live, dx, column, hidden);
}

// ---- loops over rows ------------------------------------------------------------------------------------------------

float live_count(const float* mask, int64_t hidden) {
  int64_t live = 0;
  for (int64_t j = 0; j < hidden; ++j) live += mask[j] != 0.0f;
  return static_cast<float>(live > 1 ? live : 1);
}

template <typename T, typename Row>
void forward(Row row, const void* x, const float* weight, const float* mask, void* out, float* r, float eps,
             int64_t tokens, int64_t hidden, intptr_t executor) {
  const T* source = static_cast<const T*>(x);
  T* target = static_cast<T*>(out);
  const float live = live_count(mask, hidden);
#pragma omp parallel for num_threads(parallel_threads(executor, tokens * hidden)) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    r[t] = row(source + t * hidden, weight, mask, target + t * hidden, eps, live, hidden);
  }
}

template <typename T, typename Row>
void backward(Row row, const void* dout, const void* x, const float* weight, const float* mask, const float* r,
              void* dx, float* partial, int64_t tokens, int64_t hidden, intptr_t executor) {
  const T* upstream = static_cast<const T*>(dout);
  const T* source = static_cast<const T*>(x);
  T* target = static_cast<T*>(dx);
  const float live = live_count(mask, hidden);
  const int64_t strip_size = strip_tokens(tokens);
#pragma omp parallel for num_threads(parallel_threads(executor, tokens * hidden)) schedule(static)
  for (int64_t strip = 0; strip < strip_count(tokens); ++strip) {
    float* column = partial + strip * hidden;
    std::memset(column, 0, static_cast<size_t>(hidden) * sizeof(float));
    const int64_t end = (strip + 1) * strip_size < tokens ? (strip + 1) * strip_size : tokens;
    for (int64_t t = strip * strip_size; t < end; ++t) {
      row(upstream + t * hidden, source + t * hidden, weight, mask, r[t], live, target + t * hidden, column, hidden);
    }
  }
}

// The mask, or as many ones where the caller gave none.
const float* mask_or_ones(const float* mask, std::vector<float>& ones, int64_t hidden) {
  if (mask != nullptr) return mask;
  ones.assign(static_cast<size_t>(hidden), 1.0f);
  return ones.data();
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void masked_rms_norm_forward(const void* x, const float* weight, const float* mask, void* out, float* r, float eps,
                             int64_t tokens, int64_t hidden, Dtype dtype, intptr_t executor) {
  std::vector<float> ones;
  const float* factor = mask_or_ones(mask, ones, hidden);
  if (dtype == Dtype::Float32) {
    forward<float>(forward_fp32, x, weight, factor, out, r, eps, tokens, hidden, executor);
  } else {
    forward<BFloat16>(forward_bf16, x, weight, factor, out, r, eps, tokens, hidden, executor);
  }
}

void masked_rms_norm_backward(const void* dout, const void* x, const float* weight, const float* mask, const float* r,
                              void* dx, float* dweight, float* dmask, float* partial, int64_t tokens, int64_t hidden,
                              Dtype dtype, intptr_t executor) {
  std::vector<float> ones;
  const float* factor = mask_or_ones(mask, ones, hidden);
  if (dtype == Dtype::Float32) {
    backward<float>(backward_fp32, dout, x, weight, factor, r, dx, partial, tokens, hidden, executor);
  } else {
    backward<BFloat16>(backward_bf16, dout, x, weight, factor, r, dx, partial, tokens, hidden, executor);
  }
  sum_strips(partial, dweight, strip_count(tokens), hidden, parallel_threads(executor, tokens * hidden));
  for (int64_t j = 0; j < hidden; ++j) {
    const float sum = dweight[j];
    dweight[j] = sum * factor[j];
    if (mask != nullptr) dmask[j] = sum * weight[j];
  }
}

}  // namespace megashear
