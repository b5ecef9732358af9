// cpu.cpp: masked RMSNorm on the CPU; threads share the rows forward and the strips of rows backward.
#include <cmath>
#include <vector>

#include "../parallel_cpu.h"
#include "masked_rms_norm.h"

namespace megashear {
namespace {

// The vectors of all rows; masks are never null here.
struct Vectors {
  const float *weight, *mask, *branch_mask;
  float live;
  int64_t hidden;
};

// Addresses of one token's rows, null where there is none.
template <typename T>
struct ForwardRow {
  const T *x, *branch;
  T *sum, *out;
  float eps;
};

template <typename T>
struct BackwardRow {
  const T *dout, *dsum, *x, *branch;
  T *dx, *dbranch;
  float r, *column, *branch_column;  // sums of this strip
};

// ---- kernels of one row ---------------------------------------------------------------------------------------------

template <typename T>
MEGASHEAR_ROW float norm_row(const T* __restrict x, T* __restrict out, const Vectors& v, float eps) {
  const float *__restrict weight = v.weight, *__restrict mask = v.mask;
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t j = 0; j < v.hidden; ++j) {
    const float value = live_or_zero(widen(x[j]), mask[j]);
    square += value * value;
  }
  const float r = 1.0f / std::sqrt(square / v.live + eps);
#pragma omp simd
  for (int64_t j = 0; j < v.hidden; ++j) {
    out[j] = narrow<T>(masked_rms_norm(normalised<T>(widen(x[j]), r), weight[j], mask[j]));
  }
  return r;
}

template <typename T>
MEGASHEAR_ROW float forward_row(const ForwardRow<T>& row, const Vectors& v) {
  if (row.branch == nullptr) return norm_row(row.x, row.out, v, row.eps);
  const T *__restrict x = row.x, *__restrict branch = row.branch;
  const float* __restrict branch_mask = v.branch_mask;
  T* __restrict sum = row.sum;
#pragma omp simd
  for (int64_t j = 0; j < v.hidden; ++j) sum[j] = narrow<T>(widen(x[j]) + widen(branch[j]) * branch_mask[j]);
  return norm_row(sum, row.out, v, row.eps);
}

template <bool HasSum, bool HasBranchMask, typename T>
MEGASHEAR_ROW void gradient_row(const BackwardRow<T>& row, const Vectors& v, float pull) {
  const T *__restrict dout = row.dout, *__restrict dsum = row.dsum, *__restrict x = row.x;
  const T* __restrict branch = row.branch;
  const float *__restrict weight = v.weight, *__restrict mask = v.mask, *__restrict branch_mask = v.branch_mask;
  T *__restrict dx = row.dx, *__restrict dbranch = row.dbranch;
  float *__restrict column = row.column, *__restrict branch_column = row.branch_column;
  const float r = row.r;
#pragma omp simd
  for (int64_t j = 0; j < v.hidden; ++j) {
    const float upstream = widen(dout[j]), value = widen(x[j]);
    column[j] += upstream * normalised<T>(value, r);
    float d = masked_rms_norm_dx(upstream, value, weight[j], mask[j], r, pull);
    if constexpr (HasSum) d += widen(dsum[j]);
    dx[j] = narrow<T>(d);
    if constexpr (HasBranchMask) {
      dbranch[j] = narrow<T>(d * branch_mask[j]);
      branch_column[j] += d * widen(branch[j]);
    }
  }
}

template <typename T>
MEGASHEAR_ROW void backward_row(const BackwardRow<T>& row, const Vectors& v) {
  const T *__restrict dout = row.dout, *__restrict x = row.x;
  const float *__restrict weight = v.weight, *__restrict mask = v.mask;
  float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < v.hidden; ++j) dot += widen(dout[j]) * weight[j] * mask[j] * widen(x[j]);
  const float pull = row.r * row.r * row.r / v.live * dot;
  if (row.dsum == nullptr && row.branch == nullptr) return gradient_row<false, false>(row, v, pull);
  if (row.branch == nullptr) return gradient_row<true, false>(row, v, pull);
  if (row.dsum == nullptr) return gradient_row<false, true>(row, v, pull);
  gradient_row<true, true>(row, v, pull);
}

MEGASHEAR_MULTIVERSION float forward_one(const ForwardRow<float>& row, const Vectors& v) { return forward_row(row, v); }
MEGASHEAR_MULTIVERSION float forward_one(const ForwardRow<BFloat16>& row, const Vectors& v) {
  return forward_row(row, v);
}
MEGASHEAR_MULTIVERSION float forward_one(const ForwardRow<Float16>& row, const Vectors& v) {
  return forward_row(row, v);
}
MEGASHEAR_MULTIVERSION void backward_one(const BackwardRow<float>& row, const Vectors& v) { backward_row(row, v); }
MEGASHEAR_MULTIVERSION void backward_one(const BackwardRow<BFloat16>& row, const Vectors& v) { backward_row(row, v); }
MEGASHEAR_MULTIVERSION void backward_one(const BackwardRow<Float16>& row, const Vectors& v) { backward_row(row, v); }

// ---- loops over rows ------------------------------------------------------------------------------------------------

// `ones` stands in for masks that are null.
Vectors vectors(const float* weight, const float* mask, const float* branch_mask, std::vector<float>& ones,
                int64_t hidden) {
  if (mask == nullptr || branch_mask == nullptr) ones.assign(static_cast<size_t>(hidden), 1.0f);
  Vectors v = {weight, mask == nullptr ? ones.data() : mask, branch_mask == nullptr ? ones.data() : branch_mask, 1.0f,
               hidden};
  int64_t live = 0;
  for (int64_t j = 0; j < hidden; ++j) live += v.mask[j] != 0.0f;
  if (live > 1) v.live = static_cast<float>(live);
  return v;
}

template <typename T>
T* row_at(const void* matrix, int64_t row, int64_t stride) {
  return matrix == nullptr ? nullptr : static_cast<T*>(const_cast<void*>(matrix)) + row * stride;
}

template <typename T>
void forward(const NormForward& norm, const Vectors& v, int64_t tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const ForwardRow<T> row = {row_at<T>(norm.x, t, norm.x_row), row_at<T>(norm.branch, t, norm.branch_row),
                               row_at<T>(norm.sum, t, v.hidden), row_at<T>(norm.out, t, v.hidden), norm.eps};
    norm.r[t] = forward_one(row, v);
  }
}

template <typename T>
void backward(const NormBackward& norm, const Vectors& v, int64_t tokens, int threads) {
  const int64_t strips = strip_count(tokens), strip_size = strip_tokens(tokens), hidden = v.hidden;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t strip = 0; strip < strips; ++strip) {
    float* column = norm.partial + strip * hidden;
    float* branch_column = norm.dbranch_mask == nullptr ? nullptr : column + strips * hidden;
    std::memset(column, 0, static_cast<size_t>(hidden) * sizeof(float));
    if (branch_column != nullptr) std::memset(branch_column, 0, static_cast<size_t>(hidden) * sizeof(float));
    const int64_t end = (strip + 1) * strip_size < tokens ? (strip + 1) * strip_size : tokens;
    for (int64_t t = strip * strip_size; t < end; ++t) {
      const BackwardRow<T> row = {row_at<T>(norm.dout, t, norm.dout_row),
                                  row_at<T>(norm.dsum, t, norm.dsum_row),
                                  row_at<T>(norm.x, t, norm.x_row),
                                  row_at<T>(norm.branch, t, norm.branch_row),
                                  row_at<T>(norm.dx, t, hidden),
                                  row_at<T>(norm.dbranch, t, hidden),
                                  norm.r[t],
                                  column,
                                  branch_column};
      backward_one(row, v);
    }
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void masked_rms_norm_forward(const NormForward& norm, int64_t tokens, int64_t hidden, Dtype dtype, intptr_t executor) {
  std::vector<float> ones;
  const Vectors v = vectors(norm.weight, norm.mask, norm.branch_mask, ones, hidden);
  const int threads = parallel_threads(executor, tokens * hidden);
  by_dtype(dtype, [&](auto element) { forward<decltype(element)>(norm, v, tokens, threads); });
}

void masked_rms_norm_backward(const NormBackward& norm, int64_t tokens, int64_t hidden, Dtype dtype,
                              intptr_t executor) {
  std::vector<float> ones;
  const Vectors v = vectors(norm.weight, norm.mask, norm.branch_mask, ones, hidden);
  const int threads = parallel_threads(executor, tokens * hidden);
  by_dtype(dtype, [&](auto element) { backward<decltype(element)>(norm, v, tokens, threads); });
  const int64_t strips = strip_count(tokens);
  sum_strips(norm.partial, norm.dweight, strips, hidden, threads);
  for (int64_t j = 0; j < hidden; ++j) {
    const float sum = norm.dweight[j];
    norm.dweight[j] = sum * v.mask[j];
    if (norm.mask != nullptr) norm.dmask[j] = sum * v.weight[j];
  }
  if (norm.dbranch_mask != nullptr) {
    sum_strips(norm.partial + strips * hidden, norm.dbranch_mask, strips, hidden, threads);
  }
}

}  // namespace megashear
