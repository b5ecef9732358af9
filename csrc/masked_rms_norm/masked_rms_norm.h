// masked_rms_norm.h: out[t, j] = weight[j] * mask[j] * h[t, j],  h[t, j] = x[t, j] * r[t]   t: token, j: dimension
//
//   x[t, j]    = rounded to its dtype: residual[t, j] + branch[t, j] * branch_mask[j], or given as it is
//   r[t]       = rsqrt(sum over mask[j] != 0 of x[t, j]^2 / #{j: mask[j] != 0} + eps)    h is rounded to x's dtype
//   dh[t, j]   = dout * weight * mask
//   dx[t, j]   = dsum + r dh - [mask != 0] x r^3 / n * sum over k of dh[t, k] x[t, k]      n = #{j: mask[j] != 0}
//   c[j]       = sum over t of dout * h, by strips of tokens in a fixed order;  dweight = mask * c,  dmask = weight * c
// and with a branch: dresidual = dx, dbranch = dx * branch_mask, dbranch_mask[j] = sum over t of dx * branch, likewise.
// Null masks mean ones. The count of live dimensions is at least 1, so a mask of zeros gives zeros.
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
  const float direct = dout * weight * mask * r, pulled = direct - x * pull;
  return mask != 0.0f ? pulled : direct;
}

// Matrices are [tokens, hidden] of one dtype; those that are read have contiguous rows `*_row` elements apart, those
// that are written are contiguous. Vectors are fp32 [hidden], r fp32 [tokens].
struct NormForward {
  const void *x, *branch;  // branch: null for none; then sum is null too, and nothing is added
  int64_t x_row, branch_row;
  const float *branch_mask, *weight, *mask;
  void *sum, *out;
  float* r;  // for the backward pass
  float eps;
};

struct NormBackward {
  const void *dout, *dsum, *x, *branch;  // x: what was normed; dsum: null for none; branch: null without branch_mask
  int64_t dout_row, dsum_row, x_row, branch_row;
  const float *branch_mask, *weight, *mask, *r;
  void *dx, *dbranch;  // dbranch: null without branch_mask, for it is dx then
  float *dweight, *dmask, *dbranch_mask;  // null with their masks; dbranch_mask says whether there is a branch mask
  float* partial;  // scratch [1 or, with branch_mask, 2; strip_count(tokens); hidden]
};

// Launchers, defined by cpu.cpp and cuda.cu. `executor` is the number of threads or the CUDA stream.
void masked_rms_norm_forward(const NormForward& norm, int64_t tokens, int64_t hidden, Dtype dtype, intptr_t executor);
void masked_rms_norm_backward(const NormBackward& norm, int64_t tokens, int64_t hidden, Dtype dtype, intptr_t executor);

}  // namespace megashear
