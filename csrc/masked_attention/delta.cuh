// delta.cuh: delta[i] = dout[i] . out[i] of each query, and the masks' gradients, which are its sums.
//
// A block sums kDeltaTokens queries of one head in a fixed order; another kernel adds the blocks in order.
#pragma once

#include "../cuda_launch.cuh"
#include "masked_attention.h"

namespace megashear {

constexpr int kDeltaTokens = 128;  // of one head, to a block

inline int64_t delta_blocks(int64_t tokens) { return (tokens + kDeltaTokens - 1) / kDeltaTokens; }

// Eight lanes share a query, each takes every eighth pack of N columns. table: [batch * blocks, heads].
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) delta_kernel(AttentionBackward pass, float* delta, float* table) {
  const AttentionSizes& sizes = pass.forward.sizes;
  const int64_t blocks = (sizes.tokens + kDeltaTokens - 1) / kDeltaTokens;
  const int64_t block = blockIdx.x % blocks, head = blockIdx.x / blocks;
  const int64_t b = head / sizes.heads, h = head % sizes.heads;
  const AttentionTensor &dout = pass.dout, &out = pass.forward.out;
  const T* left = static_cast<const T*>(dout.data) + b * dout.batch + h * dout.head;
  const T* right = static_cast<const T*>(out.data) + b * out.batch + h * out.head;
  const bool live = pass.forward.mask == nullptr || pass.forward.mask[h] != 0.0f;
  const int64_t end = (block + 1) * kDeltaTokens < sizes.tokens ? (block + 1) * kDeltaTokens : sizes.tokens;
  const int share = threadIdx.x % 8;
  float total = 0.0f;
  for (int i = threadIdx.x / 8; i < kDeltaTokens; i += kThreads / 8) {
    const int64_t token = block * kDeltaTokens + i;
    float sum = 0.0f;
    if (live && token < end) {
      for (int64_t d = share * N; d < sizes.head_dim; d += 8 * N) {
        const Pack<T, N> x = load<T, N>(left + token * dout.token + d), y = load<T, N>(right + token * out.token + d);
#pragma unroll
        for (int n = 0; n < N; ++n) sum += widen(x.value[n]) * widen(y.value[n]);
      }
    }
#pragma unroll
    for (int bits = 1; bits < 8; bits *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (share == 0 && token < end) delta[head * sizes.tokens + token] = sum;
    total += share == 0 ? sum : 0.0f;
  }
  total = block_sum(total);
  if (threadIdx.x == 0) table[(b * blocks + block) * sizes.heads + h] = total;
}

// dmask[h] = sum of the table's column h / mask[h], and 0 where that is 0.
__global__ void mask_gradient_kernel(const float* table, const float* mask, float* dmask, int64_t rows, int64_t heads) {
  const float sum = strip_sum(table, rows, heads);
  const int64_t h = strip_sum_column();
  if (h < heads && gives_strip_sum()) dmask[h] = mask[h] == 0.0f ? 0.0f : sum / mask[h];
}

}  // namespace megashear
