// cpu.cpp: cross entropy on the CPU; threads share the tokens, a row goes through the cache in chunks.
#include <cmath>

#include "../parallel_cpu.h"
#include "cross_entropy.h"

namespace megashear {
namespace {

constexpr int64_t kChunk = 1024;  // columns whose largest logit is looked up before their exponentials are added

// ---- kernels of one row ---------------------------------------------------------------------------------------------

template <typename T>
MEGASHEAR_ROW ExponentialSum sum_row(const T* __restrict logits, int64_t columns) {
  ExponentialSum total{-INFINITY, 0.0f};
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    const int64_t end = begin + kChunk < columns ? begin + kChunk : columns;
    float peak = total.peak, sum = 0.0f;
#pragma omp simd reduction(max : peak)
    for (int64_t v = begin; v < end; ++v) {
      const float logit = widen(logits[v]);
      peak = logit > peak ? logit : peak;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t v = begin; v < end; ++v) sum += exponential(widen(logits[v]) - peak);
    total = {peak, rescaled(total, peak) + sum};
  }
  return total;
}

template <typename T>
MEGASHEAR_ROW void gradient_row(T* logits, float log_sum, float dlog_sum, int64_t columns) {
#pragma omp simd
  for (int64_t v = 0; v < columns; ++v) {
    logits[v] = narrow<T>(cross_entropy_gradient(widen(logits[v]), log_sum, dlog_sum, 0.0f));
  }
}

MEGASHEAR_MULTIVERSION ExponentialSum sum(const float* logits, int64_t columns) { return sum_row(logits, columns); }
MEGASHEAR_MULTIVERSION ExponentialSum sum(const BFloat16* logits, int64_t columns) { return sum_row(logits, columns); }
MEGASHEAR_MULTIVERSION ExponentialSum sum(const Float16* logits, int64_t columns) { return sum_row(logits, columns); }

MEGASHEAR_MULTIVERSION void gradient(float* logits, float log_sum, float dlog_sum, int64_t columns) {
  gradient_row(logits, log_sum, dlog_sum, columns);
}
MEGASHEAR_MULTIVERSION void gradient(BFloat16* logits, float log_sum, float dlog_sum, int64_t columns) {
  gradient_row(logits, log_sum, dlog_sum, columns);
}
MEGASHEAR_MULTIVERSION void gradient(Float16* logits, float log_sum, float dlog_sum, int64_t columns) {
  gradient_row(logits, log_sum, dlog_sum, columns);
}

// ---- loops over rows ------------------------------------------------------------------------------------------------

template <typename T>
void forward(const T* logits, const int64_t* labels, float* log_sum, float* label_logit, int64_t tokens,
             int64_t width, int64_t columns, int64_t first, intptr_t executor) {
#pragma omp parallel for num_threads(parallel_threads(executor, tokens * width)) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = logits + t * width;
    const ExponentialSum total = sum(row, columns);
    const int64_t label = labels[t] - first;
    log_sum[t] = total.peak + std::log(total.sum);
    label_logit[t] = label >= 0 && label < columns ? widen(row[label]) : 0.0f;
  }
}

template <typename T>
void backward(T* logits, const int64_t* labels, const float* log_sum, const float* dlog_sum, const float* dlabel_logit,
              int64_t tokens, int64_t width, int64_t columns, int64_t first, intptr_t executor) {
#pragma omp parallel for num_threads(parallel_threads(executor, tokens * width)) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    T* row = logits + t * width;
    const int64_t label = labels[t] - first;
    const bool here = label >= 0 && label < columns;
    const float logit = here ? widen(row[label]) : 0.0f;
    gradient(row, log_sum[t], dlog_sum[t], columns);
    if (here) row[label] = narrow<T>(cross_entropy_gradient(logit, log_sum[t], dlog_sum[t], dlabel_logit[t]));
    for (int64_t v = columns; v < width; ++v) row[v] = narrow<T>(0.0f);
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void cross_entropy_forward(const void* logits, const int64_t* labels, float* log_sum, float* label_logit,
                           int64_t tokens, int64_t width, int64_t columns, int64_t first, Dtype dtype,
                           intptr_t executor) {
  by_dtype(dtype, [&](auto element) {
    const auto* source = static_cast<const decltype(element)*>(logits);
    forward(source, labels, log_sum, label_logit, tokens, width, columns, first, executor);
  });
}

void cross_entropy_backward(void* logits, const int64_t* labels, const float* log_sum, const float* dlog_sum,
                            const float* dlabel_logit, int64_t tokens, int64_t width, int64_t columns, int64_t first,
                            Dtype dtype, intptr_t executor) {
  by_dtype(dtype, [&](auto element) {
    auto* target = static_cast<decltype(element)*>(logits);
    backward(target, labels, log_sum, dlog_sum, dlabel_logit, tokens, width, columns, first, executor);
  });
}

}  // namespace megashear
