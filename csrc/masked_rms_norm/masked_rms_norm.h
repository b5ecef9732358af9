// masked_rms_norm.h: out[t, j] = weight[j] * mask[j] * h[t, j],  h[t, j] = x[t, j] * r[t]   t: token, j: dimension
//
//   r[t]       = rsqrt(sum over mask[j] != 0 of x[t, j]^2 / #{j: mask[j] != 0} + eps)    h is rounded to x's dtype
//   dh[t, j]   = dout * weight * mask
//   dx[t, j]   = r dh - [mask != 0] x r^3 / n * sum over k of dh[t, k] x[t, k]             n = #{j: mask[j] != 0}
//   c[j]       = sum over t of dout * h, by strips of tokens in a fixed order;  dweight = mask * c,  dmask = weight * c
// A null mask stands for ones. The count of live dimensions is at least 1, so a mask of zeros gives zeros.
#pragma once

#include "../number.h"

namespace megashear {

MEGASHEAR_INLINE float live_or_zero(float x, float mask) { return mask != 0.0f ? x : 0.0f; }

template <typename T>
MEGASHEAR_INLINE float normalised(float x, float r) {
  return widen(narrow<T>(x * r));
}

MEGASHEAR_INLINE float masked_rms_norm(float h, float weight, float mask) { return weight * h * mask; }

// `pull` is r^3 / n * sum of dh x, one value per token.
MEGASHEAR_INLINE float masked_rms_norm_dx(float dout, float x, float weight, float mask, float r, float pull) {
  return dout * weight * mask * r - live_or_zero(x, mask) * pull;
}

// Launchers, on the CPU or on CUDA by the file that is linked. `executor` is the number of threads or the stream.
// x, out, dout, dx: [tokens, hidden] of `dtype`; weight, mask, dweight, dmask: fp32 [hidden]; r: fp32 [tokens], written
// by the forward pass for the backward; partial: fp32 [strip_count(tokens), hidden], scratch. mask and dmask are null
// together.
void masked_rms_norm_forward(const void* x, const float* weight, const float* mask, void* out, float* r, float eps,
                             int64_t tokens, int64_t hidden, Dtype dtype, intptr_t executor);
void masked_rms_norm_backward(const void* dout, const void* x, const float* weight, const float* mask, const float* r,
                              void* dx, float* dweight, float* dmask, float* partial, int64_t tokens, int64_t hidden,
                              Dtype dtype, intptr_t executor);

}  // namespace megashear
