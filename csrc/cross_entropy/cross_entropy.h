// cross_entropy.h: the two terms of each token's cross entropy over the columns of a vocabulary that are here.
//
//   log_sum[t]     = ln(sum over v < columns of exp(logits[t, v]))            t: token, v: vocabulary entry first + v
//   label_logit[t] = logits[t, labels[t] - first] where that column is here, else 0
//   dlogits[t, v]  = dlog_sum[t] * exp(logits[t, v] - log_sum[t]) + dlabel_logit[t] * (v = labels[t] - first)
//
// Columns from `columns` to `width` are padding: they count for nothing and their gradient is 0. The loss of a token
// is log_sum - label_logit, the first joined and the second summed over the ranks that share a vocabulary. Logits are
// read once forward, each row's sum rescaled as its largest logit grows; the gradient takes their place in memory.
#pragma once

#include "../number.h"

namespace megashear {

// A sum of exponentials: sum of exp(x - peak) over the x so far, peak the largest of them (-inf before the first).
struct ExponentialSum {
  float peak, sum;
};

// The same sum relative to a peak at least as large. A NaN among the x is in the sum, and stays.
MEGASHEAR_INLINE float rescaled(ExponentialSum part, float peak) {
  return part.sum == 0.0f ? 0.0f : part.sum * exponential(part.peak - peak);
}

MEGASHEAR_INLINE float cross_entropy_gradient(float logit, float log_sum, float dlog_sum, float dlabel_logit) {
  return dlog_sum * exponential(logit - log_sum) + dlabel_logit;
}

// Launchers, defined by cpu.cpp and cuda.cu. `executor` is the number of threads or the CUDA stream.
// logits: [tokens, width] of `dtype`; labels: int64 [tokens]; the others: fp32 [tokens]. 0 <= columns <= width.
void cross_entropy_forward(const void* logits, const int64_t* labels, float* log_sum, float* label_logit,
                           int64_t tokens, int64_t width, int64_t columns, int64_t first, Dtype dtype,
                           intptr_t executor);
// Overwrites the logits with their gradient.
void cross_entropy_backward(void* logits, const int64_t* labels, const float* log_sum, const float* dlog_sum,
                            const float* dlabel_logit, int64_t tokens, int64_t width, int64_t columns, int64_t first,
                            Dtype dtype, intptr_t executor);

}  // namespace megashear
