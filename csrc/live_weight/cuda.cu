// cuda.cu: gathering live weights and adding their gradients on CUDA; a block owns columns of one row at a time.
#include "../cuda_launch.cuh"
#include "live_weight.h"

namespace megashear {
namespace {

// ---- kernels --------------------------------------------------------------------------------------------------------

constexpr int64_t kMostRowBlocks = 65535;  // the grid's limit in y; a block takes every so many rows

template <typename T>
__global__ void gather_kernel(const T* weight, const int64_t* rows, const int64_t* columns, T* live, int64_t row_count,
                              int64_t column_count, int64_t stride) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= column_count) return;
  const int64_t column = columns == nullptr ? j : columns[j];
  for (int64_t i = blockIdx.y; i < row_count; i += gridDim.y) {
    live[i * column_count + j] = weight[(rows == nullptr ? i : rows[i]) * stride + column];
  }
}

template <typename T>
__global__ void add_kernel(const T* dlive, const int64_t* rows, const int64_t* columns, float* total, int64_t row_count,
                           int64_t column_count, int64_t stride) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= column_count) return;
  const int64_t column = columns == nullptr ? j : columns[j];
  for (int64_t i = blockIdx.y; i < row_count; i += gridDim.y) {
    total[(rows == nullptr ? i : rows[i]) * stride + column] += widen(dlive[i * column_count + j]);
  }
}

dim3 grid_of(int64_t row_count, int64_t column_count) {
  const int64_t row_blocks = row_count < kMostRowBlocks ? row_count : kMostRowBlocks;
  return dim3(blocks_for(column_count, kThreads), static_cast<unsigned>(row_blocks));
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void live_weight_gather(const void* weight, const int64_t* rows, const int64_t* columns, void* live, int64_t row_count,
                        int64_t column_count, int64_t stride, int bytes, intptr_t executor) {
  if (row_count == 0 || column_count == 0) return;
  const dim3 grid = grid_of(row_count, column_count);
  if (bytes == 4) {
    gather_kernel<<<grid, kThreads, 0, stream_of(executor)>>>(static_cast<const uint32_t*>(weight), rows, columns,
                                                              static_cast<uint32_t*>(live), row_count, column_count,
                                                              stride);
  } else {
    gather_kernel<<<grid, kThreads, 0, stream_of(executor)>>>(static_cast<const uint16_t*>(weight), rows, columns,
                                                              static_cast<uint16_t*>(live), row_count, column_count,
                                                              stride);
  }
  check_launch("live_weight_gather");
}

void live_weight_add(const void* dlive, const int64_t* rows, const int64_t* columns, float* total, int64_t row_count,
                     int64_t column_count, int64_t stride, Dtype dtype, intptr_t executor) {
  if (row_count == 0 || column_count == 0) return;
  const dim3 grid = grid_of(row_count, column_count);
  by_dtype(dtype, [&](auto element) {
    add_kernel<<<grid, kThreads, 0, stream_of(executor)>>>(static_cast<const decltype(element)*>(dlive), rows, columns,
                                                           total, row_count, column_count, stride);
  });
  check_launch("live_weight_add");
}

}  // namespace megashear
