// cuda_cores.cuh: attention without tensor cores, for fp32, and for heads wider than those of tile.cuh: up to 256.
//
// A block owns 16 rows (queries, or keys for the gradients of keys), a warp four of them. It walks over tiles of 32
// others in shared memory, all widened to fp32. First a lane is one of the others: it makes the dot products with the
// warp's rows. Then a lane is every 32nd column: it adds the others with their weights.
#pragma once

#include "../cuda_launch.cuh"
#include "masked_attention.h"
#include "tile.cuh"

namespace megashear {

constexpr int kPlainWidth = 256;    // largest head size
constexpr int kPlainThreads = 128;  // four warps
constexpr int kPlainWarpRows = 4, kPlainRows = 4 * kPlainWarpRows, kPlainOthers = 32;

// ---- memory ---------------------------------------------------------------------------------------------------------

inline int plain_stride(int64_t width) { return static_cast<int>(width) | 1; }  // odd: a column of rows has all banks

// Shared memory, in bytes, of two matrices of own rows and two of others.
inline int plain_bytes(int64_t width) { return 4 * 2 * (kPlainRows + kPlainOthers) * plain_stride(width); }

__device__ __forceinline__ float read_number(const void* data, int64_t i, Dtype dtype) {
  if (dtype == Dtype::Float32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::BFloat16) return widen(static_cast<const BFloat16*>(data)[i]);
  return widen(static_cast<const Float16*>(data)[i]);
}

__device__ __forceinline__ void write_number(void* data, int64_t i, Dtype dtype, float value) {
  if (dtype == Dtype::Float32) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == Dtype::BFloat16) {
    static_cast<BFloat16*>(data)[i] = narrow<BFloat16>(value);
  } else {
    static_cast<Float16*>(data)[i] = narrow<Float16>(value);
  }
}

// What a plain kernel knows of its block.
struct PlainBlock {
  int64_t b, h;  // h: the head, or the group
  int tokens, width, stride, begin, row;  // row: the warp's first
  Dtype dtype;
  float *own[2], *others[2];

  __device__ __forceinline__ PlainBlock(const AttentionForward& pass, int64_t heads, float* memory)
      : tokens(static_cast<int>(pass.sizes.tokens)),
        width(static_cast<int>(pass.sizes.head_dim)),
        stride(width | 1),
        dtype(pass.dtype) {
    const int blocks = (tokens + kPlainRows - 1) / kPlainRows;
    const int64_t head = blockIdx.x / blocks;
    b = head / heads;
    h = head % heads;
    begin = static_cast<int>(blockIdx.x % blocks) * kPlainRows;
    row = begin + own_warp() * kPlainWarpRows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[i] = memory + i * kPlainRows * stride;
      others[i] = memory + (2 * kPlainRows + i * kPlainOthers) * stride;
    }
  }

  __device__ __forceinline__ int64_t at(const AttentionTensor& tensor, int64_t head, int token) const {
    return b * tensor.batch + head * tensor.head + token * tensor.token;
  }

  // `rows` rows from `first`, zeros beyond the last token.
  __device__ __forceinline__ void fill(float* to, const AttentionTensor& tensor, int64_t head, int first,
                                       int rows) const {
    for (int i = own_warp(); i < rows; i += kPlainThreads / 32) {
      for (int d = own_lane(); d < width; d += 32) {
        to[i * stride + d] =
            first + i < tokens ? read_number(tensor.data, at(tensor, head, first + i) + d, dtype) : 0.0f;
      }
    }
  }

  // The dot product of row r of the warp's in own[matrix] with this lane's row of others[matrix].
  __device__ __forceinline__ float dot(int matrix, int r) const {
    const float* left = own[matrix] + (own_warp() * kPlainWarpRows + r) * stride;
    const float* right = others[matrix] + own_lane() * stride;
    float sum = 0.0f;
    for (int d = 0; d < width; ++d) sum = fmaf(left[d], right[d], sum);
    return sum;
  }
};

// This lane's columns of the warp's rows.
struct PlainSums {
  float value[kPlainWarpRows][kPlainWidth / 32];

  __device__ __forceinline__ PlainSums() {
#pragma unroll
    for (int r = 0; r < kPlainWarpRows; ++r) {
#pragma unroll
      for (int c = 0; c < kPlainWidth / 32; ++c) value[r][c] = 0.0f;
    }
  }

  // Adds the others, each lane's with its weight.
  __device__ __forceinline__ void add(int r, float weight, const PlainBlock& block, int matrix) {
    for (int j = 0; j < kPlainOthers; ++j) {
      const float factor = __shfl_sync(0xffffffffu, weight, j);
      const float* other = block.others[matrix] + j * block.stride;
#pragma unroll
      for (int c = 0; c < kPlainWidth / 32; ++c) {
        const int d = own_lane() + 32 * c;
        if (d < block.width) value[r][c] = fmaf(factor, other[d], value[r][c]);
      }
    }
  }

  __device__ __forceinline__ void write(int r, float factor, const PlainBlock& block,
                                        const AttentionTensor& tensor) const {
    if (block.row + r >= block.tokens) return;
    const int64_t at = block.at(tensor, block.h, block.row + r);
#pragma unroll
    for (int c = 0; c < kPlainWidth / 32; ++c) {
      const int d = own_lane() + 32 * c;
      if (d < block.width) write_number(tensor.data, at + d, block.dtype, value[r][c] * factor);
    }
  }
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, bits));
  return value;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kPlainThreads) plain_forward_kernel(AttentionForward pass, float scale) {
  extern __shared__ float numbers[];
  const PlainBlock block(pass, pass.sizes.heads, numbers);
  const int64_t g = block.h * pass.sizes.groups / pass.sizes.heads;
  const int32_t* first = pass.first == nullptr ? nullptr : pass.first + block.b * block.tokens;
  const float z = pass.mask == nullptr ? 1.0f : pass.mask[block.h];
  const int end = min(block.begin + kPlainRows, block.tokens);
  float* lse = pass.lse + (block.b * pass.sizes.heads + block.h) * block.tokens;
  PlainSums out;
  float peak[kPlainWarpRows], sum[kPlainWarpRows];
#pragma unroll
  for (int r = 0; r < kPlainWarpRows; ++r) peak[r] = -kInfinity, sum[r] = 0.0f;
  block.fill(block.own[0], pass.q, block.h, block.begin, kPlainRows);
  const int least = first_keys(first, block.begin, end).least;
  for (int key = least / kPlainOthers * kPlainOthers; key < end && z != 0.0f; key += kPlainOthers) {
    __syncthreads();  // nobody reads the last tile any more
    block.fill(block.others[0], pass.k, g, key, kPlainOthers);
    block.fill(block.others[1], pass.v, g, key, kPlainOthers);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kPlainWarpRows; ++r) {
      const int query = block.row + r, own_key = key + own_lane();
      const bool seen = query < end && own_key <= query && own_key >= first_key(first, query);
      const float score = seen ? block.dot(0, r) * scale : -kInfinity;
      const float top = fmaxf(peak[r], warp_max(score)), base = top == -kInfinity ? 0.0f : top;
      const float p = expf(score - base), shrink = expf(peak[r] - base);
      peak[r] = top;
      sum[r] = sum[r] * shrink + warp_sum(p);
#pragma unroll
      for (int c = 0; c < kPlainWidth / 32; ++c) out.value[r][c] *= shrink;
      out.add(r, p, block, 1);
    }
  }
#pragma unroll
  for (int r = 0; r < kPlainWarpRows; ++r) {
    out.write(r, z == 0.0f ? 0.0f : z / sum[r], block, pass.out);
    if (own_lane() == 0 && block.row + r < end) lse[block.row + r] = z == 0.0f ? 0.0f : peak[r] + logf(sum[r]);
  }
}

// The probability and dS of one query and key; both 0 where the query does not see the key.
struct PlainGradient {
  float p, ds;

  __device__ __forceinline__ PlainGradient(bool seen, float score, float slope, float lse, float delta, float z)
      : p(seen ? expf(score - lse) : 0.0f), ds(seen ? p * (z * slope - delta) : 0.0f) {}
};

__global__ void __launch_bounds__(kPlainThreads)
    plain_query_gradient_kernel(AttentionBackward pass, const float* delta, float scale) {
  extern __shared__ float numbers[];
  const AttentionForward& forward = pass.forward;
  const PlainBlock block(forward, forward.sizes.heads, numbers);
  const int64_t g = block.h * forward.sizes.groups / forward.sizes.heads;
  const int32_t* first = forward.first == nullptr ? nullptr : forward.first + block.b * block.tokens;
  const float z = forward.mask == nullptr ? 1.0f : forward.mask[block.h];
  const int end = min(block.begin + kPlainRows, block.tokens);
  const int64_t rows = (block.b * forward.sizes.heads + block.h) * block.tokens;
  PlainSums dq;
  block.fill(block.own[0], forward.q, block.h, block.begin, kPlainRows);
  block.fill(block.own[1], pass.dout, block.h, block.begin, kPlainRows);
  const int least = first_keys(first, block.begin, end).least;
  for (int key = least / kPlainOthers * kPlainOthers; key < end && z != 0.0f; key += kPlainOthers) {
    __syncthreads();  // nobody reads the last tile any more
    block.fill(block.others[0], forward.k, g, key, kPlainOthers);
    block.fill(block.others[1], forward.v, g, key, kPlainOthers);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kPlainWarpRows; ++r) {
      const int query = min(block.row + r, end - 1), own_key = key + own_lane();  // rows beyond are not written
      const bool seen = own_key <= query && own_key >= first_key(first, query);
      const PlainGradient d(seen, block.dot(0, r) * scale, block.dot(1, r), forward.lse[rows + query],
                            delta[rows + query], z);
      dq.add(r, d.ds, block, 0);
    }
  }
#pragma unroll
  for (int r = 0; r < kPlainWarpRows; ++r) dq.write(r, scale, block, pass.dq);
}

__global__ void __launch_bounds__(kPlainThreads)
    plain_key_gradient_kernel(AttentionBackward pass, const float* delta, float scale) {
  extern __shared__ float numbers[];
  const AttentionForward& forward = pass.forward;
  const PlainBlock block(forward, forward.sizes.groups, numbers);
  const int64_t queries = forward.sizes.heads / forward.sizes.groups;
  const int32_t* first = forward.first == nullptr ? nullptr : forward.first + block.b * block.tokens;
  PlainSums dk, dv;
  block.fill(block.own[0], forward.k, block.h, block.begin, kPlainRows);
  block.fill(block.own[1], forward.v, block.h, block.begin, kPlainRows);
  for (int64_t head = block.h * queries; head < (block.h + 1) * queries; ++head) {
    const float z = forward.mask == nullptr ? 1.0f : forward.mask[head];
    const int64_t rows = (block.b * forward.sizes.heads + head) * block.tokens;
    for (int query = block.begin / kPlainOthers * kPlainOthers; query < block.tokens && z != 0.0f;
         query += kPlainOthers) {
      if (first_keys(first, query, min(query + kPlainOthers, block.tokens)).least >= block.begin + kPlainRows) continue;
      __syncthreads();  // nobody reads the last tile any more
      block.fill(block.others[0], forward.q, head, query, kPlainOthers);
      block.fill(block.others[1], pass.dout, head, query, kPlainOthers);
      __syncthreads();
      const int own_query = query + own_lane();
      const bool here = own_query < block.tokens;
      const float lse = here ? forward.lse[rows + own_query] : 0.0f, of_row = here ? delta[rows + own_query] : 0.0f;
#pragma unroll
      for (int r = 0; r < kPlainWarpRows; ++r) {
        const int key = block.row + r;
        const bool seen = here && key <= own_query && key >= first_key(first, own_query);
        const PlainGradient d(seen, block.dot(0, r) * scale, block.dot(1, r), lse, of_row, z);
        dv.add(r, z * d.p, block, 1);
        dk.add(r, d.ds, block, 0);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kPlainWarpRows; ++r) {
    dk.write(r, scale, block, pass.dk);
    dv.write(r, 1.0f, block, pass.dv);
  }
}

}  // namespace megashear
