// tile.cuh: tiles of a head's rows in shared memory: filled, written back, and which of their keys a query sees.
//
// A tile holds rows of D elements (head size, rounded up, zeros behind). Where an element lies, and how tiles are
// multiplied, says W: WarpTiles (warp_tiles.cuh) or WarpgroupTiles (warpgroup_tiles.cuh). Sums stay in registers,
// as C fragments of mma_warp.cuh: c[m][n] is rows 16 m of the warp's, columns 8 n.
#pragma once

#include "../cuda_launch.cuh"
#include "../mma_warp.cuh"
#include "masked_attention.h"

namespace megashear {

constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = __builtin_huge_valf();

__device__ __forceinline__ int own_lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int own_warp() { return threadIdx.x / 32; }

// One head of one sequence of a tensor.
template <typename T>
struct Head {
  T* data;
  int64_t row;  // elements from one token to the next
  int tokens, width;

  __device__ __forceinline__ Head(const AttentionTensor& tensor, const AttentionSizes& sizes, int64_t b, int64_t h)
      : data(static_cast<T*>(tensor.data) + b * tensor.batch + h * tensor.head),
        row(tensor.token),
        tokens(static_cast<int>(sizes.tokens)),
        width(static_cast<int>(sizes.head_dim)) {}
};

// ---- memory ---------------------------------------------------------------------------------------------------------

// Begins to fill a tile with `Rows` rows from `begin`, zeros beyond the last token and column, by W::threads threads.
// `wide`: rows are whole packs of 16 bytes, which are copied asynchronously; else elements go one by one.
template <typename W, int Rows, typename T>
__device__ __forceinline__ void fill_tile(T* tile, const Head<T>& head, int begin, bool wide) {
  constexpr int packs = W::D / 8;
#pragma unroll 1  // registers are short, and nothing waits for a copy
  for (int item = threadIdx.x; item < Rows * packs; item += W::threads) {
    const int row = item / packs, column = item % packs * 8, token = begin + row;
    const bool inside = token < head.tokens && column < head.width;
    const T* from = head.data + (inside ? token * head.row + column : 0);
    T* to = W::template at<Rows>(tile, row, column);
    if (wide) {
      copy_async(to, from, inside);
    } else {
      Pack<T, 8> pack = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (inside && column + i < head.width) pack.value[i] = from[i];
      }
      W::put(to, pack);
    }
  }
}

// The warp's 16 M rows of sums, times `factor` of the fragment's rows, through its own rows of a tile of `Rows`, from
// `row` on, to the tokens from `begin` on. No other warp reads these rows of the tile, nor does a product.
template <typename W, int Rows, int M, typename T>
__device__ __forceinline__ void write_rows(const float (&sums)[M][W::D / 8][4], const float (&factor)[M][2], T* tile,
                                           int row, const Head<T>& head, int begin, bool wide) {
  constexpr int D = W::D;
  const int g = own_lane() / 4, t = own_lane() % 4;
  __syncwarp();  // all lanes have read what stood there
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const uint32_t pair =
            pack_pair<T>(sums[m][n][2 * r] * factor[m][r], sums[m][n][2 * r + 1] * factor[m][r]);
        *reinterpret_cast<uint32_t*>(W::template at<Rows>(tile, row + 16 * m + 8 * r + g, 8 * n + 2 * t)) = pair;
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int item = own_lane(); item < 16 * M * (D / 8); item += 32) {
    const int own = item / (D / 8), column = item % (D / 8) * 8, token = begin + own;
    if (token >= head.tokens || column >= head.width) continue;
    const T* from = W::template at<Rows>(tile, row + own, column);
    T* to = head.data + token * head.row + column;
    if (wide) {
      store<T, 8>(to, load<T, 8>(from));
    } else {
      for (int i = 0; i < 8 && column + i < head.width; ++i) to[i] = from[i];
    }
  }
}

// Zeros to the tokens [begin, end) of a head, by the whole block.
template <typename T>
__device__ __forceinline__ void write_zeros(const Head<T>& head, int begin, int end) {
  const int last = end < head.tokens ? end : head.tokens;
  for (int row = begin + own_warp(); row < last; row += static_cast<int>(blockDim.x) / 32) {
    for (int column = own_lane(); column < head.width; column += 32) head.data[row * head.row + column] = T{};
  }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&sums)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
}

// Two neighbouring C fragments of weights as an A fragment, rounded to T.
template <typename T>
__device__ __forceinline__ void pack_weights(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_pair<T>(left[0], left[1]);
  a[1] = pack_pair<T>(left[2], left[3]);
  a[2] = pack_pair<T>(right[0], right[1]);
  a[3] = pack_pair<T>(right[2], right[3]);
}

// ---- documents ------------------------------------------------------------------------------------------------------

// First keys that queries see: those of a query, or the least and the greatest of several. Null stands for zeros.
__device__ __forceinline__ int first_key(const int32_t* first, int query) {
  return first == nullptr ? 0 : min(max(first[query], 0), query);
}

// Of one sequence: null where there are none. Made again at each use, since registers are short.
__device__ __forceinline__ const int32_t* first_of(const AttentionForward& pass, int b) {
  return pass.first == nullptr ? nullptr : pass.first + b * pass.sizes.tokens;
}

// Whether a query sees a key; of queries beyond the last token nothing is kept.
__device__ __forceinline__ bool sees(const AttentionForward& pass, int b, int query, int key) {
  return key <= query &&
         (pass.first == nullptr || query >= pass.sizes.tokens || key >= first_key(first_of(pass, b), query));
}

struct FirstKeys {
  int least, greatest;
};

// Of the queries [begin, end), end > begin; by each warp for itself.
__device__ __forceinline__ FirstKeys first_keys(const int32_t* first, int begin, int end) {
  if (first == nullptr) return {0, 0};
  FirstKeys keys = {0x7fffffff, 0};
  for (int query = begin + own_lane(); query < end; query += 32) {
    keys.least = min(keys.least, first_key(first, query));
    keys.greatest = max(keys.greatest, first_key(first, query));
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    keys.least = min(keys.least, __shfl_xor_sync(0xffffffffu, keys.least, bits));
    keys.greatest = max(keys.greatest, __shfl_xor_sync(0xffffffffu, keys.greatest, bits));
  }
  return keys;
}

}  // namespace megashear
