// cpu.cpp: gathering live weights and adding their gradients on the CPU; threads share the rows.
#include "../parallel_cpu.h"
#include "live_weight.h"

namespace megashear {
namespace {

template <typename T>
void gather(const void* weight, const int64_t* rows, const int64_t* columns, void* live, int64_t row_count,
            int64_t column_count, int64_t stride, intptr_t executor) {
  const T* source = static_cast<const T*>(weight);
  T* target = static_cast<T*>(live);
#pragma omp parallel for num_threads(parallel_threads(executor, row_count * column_count)) schedule(static)
  for (int64_t i = 0; i < row_count; ++i) {
    const T* __restrict from = source + (rows == nullptr ? i : rows[i]) * stride;
    T* __restrict to = target + i * column_count;
    if (columns == nullptr) {
      std::memcpy(to, from, static_cast<size_t>(column_count) * sizeof(T));
    } else {
      for (int64_t j = 0; j < column_count; ++j) to[j] = from[columns[j]];
    }
  }
}

template <typename T>
MEGASHEAR_ROW void add_row(const T* __restrict from, float* __restrict to, int64_t column_count) {
#pragma omp simd
  for (int64_t j = 0; j < column_count; ++j) to[j] += widen(from[j]);
}

MEGASHEAR_MULTIVERSION void add_one(const float* from, float* to, int64_t column_count) {
  add_row(from, to, column_count);
}
MEGASHEAR_MULTIVERSION void add_one(const BFloat16* from, float* to, int64_t column_count) {
  add_row(from, to, column_count);
}
MEGASHEAR_MULTIVERSION void add_one(const Float16* from, float* to, int64_t column_count) {
  add_row(from, to, column_count);
}

template <typename T>
void add(const void* dlive, const int64_t* rows, const int64_t* columns, float* total, int64_t row_count,
         int64_t column_count, int64_t stride, intptr_t executor) {
  const T* source = static_cast<const T*>(dlive);
#pragma omp parallel for num_threads(parallel_threads(executor, row_count * column_count)) schedule(static)
  for (int64_t i = 0; i < row_count; ++i) {
    const T* __restrict from = source + i * column_count;
    float* __restrict to = total + (rows == nullptr ? i : rows[i]) * stride;
    if (columns == nullptr) {
      add_one(from, to, column_count);
    } else {
      for (int64_t j = 0; j < column_count; ++j) to[columns[j]] += widen(from[j]);
    }
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void live_weight_gather(const void* weight, const int64_t* rows, const int64_t* columns, void* live, int64_t row_count,
                        int64_t column_count, int64_t stride, int bytes, intptr_t executor) {
  const auto launch = bytes == 4 ? gather<uint32_t> : gather<uint16_t>;
  launch(weight, rows, columns, live, row_count, column_count, stride, executor);
}

void live_weight_add(const void* dlive, const int64_t* rows, const int64_t* columns, float* total, int64_t row_count,
                     int64_t column_count, int64_t stride, Dtype dtype, intptr_t executor) {
  by_dtype(dtype, [&](auto element) {
    add<decltype(element)>(dlive, rows, columns, total, row_count, column_count, stride, executor);
  });
}

}  // namespace megashear
