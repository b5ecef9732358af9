// cpu.cpp: gathering live weights and adding their gradients on the CPU; threads share the rows.
#include "../parallel_cpu.h"
#include "columns_avx512.h"
#include "live_weight.h"

namespace megashear {
namespace {

template <typename T>
MEGASHEAR_ROW void add_all(const T* __restrict from, float* __restrict to, int64_t column_count) {
#pragma omp simd
  for (int64_t j = 0; j < column_count; ++j) to[j] += widen(from[j]);
}

MEGASHEAR_MULTIVERSION void add_one(const float* from, float* to, int64_t column_count) {
  add_all(from, to, column_count);
}
MEGASHEAR_MULTIVERSION void add_one(const BFloat16* from, float* to, int64_t column_count) {
  add_all(from, to, column_count);
}
MEGASHEAR_MULTIVERSION void add_one(const Float16* from, float* to, int64_t column_count) {
  add_all(from, to, column_count);
}

// How rows are read and written by column: by vectors where the processor can, else one by one.
class Columns {
 public:
  Columns(const int64_t* columns, int64_t count) : columns_(columns), count_(count) {
#if MEGASHEAR_LIVE_AVX512
    wide_ = columns != nullptr && live_avx512::supported();
    if (wide_) bits_ = live_avx512::column_bits(columns, count);
#endif
  }

  template <typename T>
  void gather(const T* __restrict from, T* __restrict to) const {
    if (columns_ == nullptr) {
      std::memcpy(to, from, static_cast<size_t>(count_) * sizeof(T));
      return;
    }
#if MEGASHEAR_LIVE_AVX512
    if (wide_) return live_avx512::gather_row(from, to, bits_);
#endif
    for (int64_t j = 0; j < count_; ++j) to[j] = from[columns_[j]];
  }

  template <typename T>
  void add(const T* __restrict from, float* __restrict to) const {
    if (columns_ == nullptr) return add_one(from, to, count_);
#if MEGASHEAR_LIVE_AVX512
    if (wide_) return live_avx512::add_row(from, to, bits_);
#endif
    for (int64_t j = 0; j < count_; ++j) to[columns_[j]] += widen(from[j]);
  }

 private:
  const int64_t* columns_;
  int64_t count_;
#if MEGASHEAR_LIVE_AVX512
  bool wide_ = false;
  std::vector<uint16_t> bits_;
#endif
};

template <typename T>
void gather(const void* weight, const int64_t* rows, const int64_t* columns, void* live, int64_t row_count,
            int64_t column_count, int64_t stride, intptr_t executor) {
  const T* source = static_cast<const T*>(weight);
  T* target = static_cast<T*>(live);
  const Columns index(columns, column_count);
#pragma omp parallel for num_threads(parallel_threads(executor, row_count * column_count)) schedule(static)
  for (int64_t i = 0; i < row_count; ++i) {
    index.gather(source + (rows == nullptr ? i : rows[i]) * stride, target + i * column_count);
  }
}

template <typename T>
void add(const void* dlive, const int64_t* rows, const int64_t* columns, float* total, int64_t row_count,
         int64_t column_count, int64_t stride, intptr_t executor) {
  const T* source = static_cast<const T*>(dlive);
  const Columns index(columns, column_count);
#pragma omp parallel for num_threads(parallel_threads(executor, row_count * column_count)) schedule(static)
  for (int64_t i = 0; i < row_count; ++i) {
    index.add(source + i * column_count, total + (rows == nullptr ? i : rows[i]) * stride);
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
