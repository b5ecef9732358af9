// cuda_launch.cuh: helpers of the CUDA kernels: vector access, block sums, launch checks and strip sums.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "number.h"

namespace megashear {

constexpr int kThreads = 256;

// N elements that are read or written by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

// 16 bytes go as one uint4, by an intrinsic where they are stored: else the compiler takes packs apart.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* address) {
  Pack<T, N> pack;
  if constexpr (sizeof pack == sizeof(uint4)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(address);
    memcpy(&pack, &bits, sizeof pack);
  } else {
    pack = *reinterpret_cast<const Pack<T, N>*>(address);
  }
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* address, const Pack<T, N>& pack) {
  if constexpr (sizeof pack == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof pack);
    __stwb(reinterpret_cast<uint4*>(address), bits);
  } else {
    *reinterpret_cast<Pack<T, N>*>(address) = pack;
  }
}

// N floats, by 16 bytes where N allows; the address is then a multiple of 16.
template <int N>
__device__ __forceinline__ void load_floats(float (&values)[N], const float* address) {
  constexpr int width = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int n = 0; n < N; n += width) {
    const Pack<float, width> pack = load<float, width>(address + n);
#pragma unroll
    for (int i = 0; i < width; ++i) values[n + i] = pack.value[i];
  }
}

template <int N>
__device__ __forceinline__ void store_floats(float* address, const float (&values)[N]) {
  constexpr int width = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int n = 0; n < N; n += width) {
    Pack<float, width> pack;
#pragma unroll
    for (int i = 0; i < width; ++i) pack.value[i] = values[n + i];
    store<float, width>(address + n, pack);
  }
}

// N floats of a mask, ones where it is null.
template <int N>
__device__ __forceinline__ void load_mask(float (&values)[N], const float* mask, int64_t column) {
  if (mask != nullptr) return load_floats<N>(values, mask + column);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 1.0f;
}

// Whether packs of 16 bytes divide `columns` (or the bits of several sizes and strides, joined by |) and every address.
template <typename T, typename... Addresses>
bool packs_fit(int64_t columns, Addresses... addresses) {
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(addresses) | ...);
  return columns % static_cast<int64_t>(16 / sizeof(T)) == 0 && bits % 16 == 0;
}

// The sum of `value` over the block's threads, given to all of them; the order of addition is fixed.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warp_sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  __syncthreads();  // the previous use of warp_sums is over
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += warp_sums[warp];
  return total;
}

// Sums over strips in a fixed order: a block takes kColumns columns, its warps share the strips.
constexpr int kColumns = 32;

__device__ __forceinline__ int64_t strip_sum_column() {
  return static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
}

// Whether this thread is the one that has its column's sum to write.
__device__ __forceinline__ bool gives_strip_sum() { return threadIdx.x < kColumns; }

// The sum of partial[strip, strip_sum_column()] over all strips.
__device__ __forceinline__ float strip_sum(const float* partial, int64_t strips, int64_t columns) {
  constexpr int warps = kThreads / kColumns;
  __shared__ float sums[warps][kColumns];
  const int64_t column = strip_sum_column();
  const int warp = threadIdx.x / kColumns, lane = threadIdx.x % kColumns;
  float sum = 0.0f;
  if (column < columns) {
    for (int64_t strip = warp; strip < strips; strip += warps) sum += partial[strip * columns + column];
  }
  __syncthreads();  // the previous use of sums is over
  sums[warp][lane] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < warps; ++i) total += sums[i][lane];
  return total;
}

inline cudaStream_t stream_of(intptr_t executor) { return reinterpret_cast<cudaStream_t>(executor); }

constexpr int64_t kMostBlocks = 0x7fffffff;  // of the grid's first dimension; the second and third take 65535

// Blocks for `work`, as many as a grid takes: kernels whose work may exceed that walk on by gridDim.
inline unsigned blocks_for(int64_t work, int64_t per_block, int64_t most = kMostBlocks) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

inline void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(status));
  }
}

}  // namespace megashear
