// live_weight.h: live[i, j] = weight[rows[i], columns[j]], and total[rows[i], columns[j]] += dlive[i, j]
//
// The part of a weight whose units have a mask that is not 0, gathered before a product, and its gradient added where
// it belongs in the full fp32 gradient. Rows and columns are strictly ascending, so no two elements meet: no atomics, the
// same bits every run. A null index means all rows, or all columns. Each live element is moved once.
#pragma once

#include "../number.h"

namespace megashear {

// Launchers, defined by cpu.cpp and cuda.cu. `executor` is the number of threads or the CUDA stream.
// weight: [.., stride] of elements of `bytes` bytes (2 or 4); live: [row_count, column_count] of the same;
// rows: int64 [row_count] or null; columns: int64 [column_count] or null.
void live_weight_gather(const void* weight, const int64_t* rows, const int64_t* columns, void* live, int64_t row_count,
                        int64_t column_count, int64_t stride, int bytes, intptr_t executor);
// total: fp32 [.., stride]; dlive: [row_count, column_count] of `dtype`.
void live_weight_add(const void* dlive, const int64_t* rows, const int64_t* columns, float* total, int64_t row_count,
                     int64_t column_count, int64_t stride, Dtype dtype, intptr_t executor);

}  // namespace megashear
