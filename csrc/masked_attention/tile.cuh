// tile.cuh: tiles of a head's rows in shared memory, and the products of tiles that a warp makes by tensor cores.
//
// A tile holds rows of D elements (head size, rounded up, zeros behind), each row 16 bytes further than the last one
// ends: so eight rows' 16 bytes at one column lie in different banks. Sums stay in registers, as C fragments of
// mma.cuh: c[m][n] is rows 16 m of the warp's, columns 8 n.
#pragma once

#include "../cuda_launch.cuh"
#include "../mma.cuh"
#include "masked_attention.h"

namespace megashear {

constexpr int kTileThreads = 128;  // four warps
constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = __builtin_huge_valf();

template <int D>
constexpr int kRow = D + 8;  // elements from one row of a tile to the next

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

// Begins to fill a tile with `Rows` rows from `begin`, zeros beyond the last token and column. `wide`: rows are whole
// packs of 16 bytes, which are copied asynchronously; else elements go one by one.
template <int Rows, int D, typename T>
__device__ __forceinline__ void fill_tile(T* tile, const Head<T>& head, int begin, bool wide) {
  constexpr int packs = D / 8;
  static_assert(Rows * packs % kTileThreads == 0);
#pragma unroll 1  // registers are short, and nothing waits for a copy
  for (int item = threadIdx.x; item < Rows * packs; item += kTileThreads) {
    const int row = item / packs, column = item % packs * 8, token = begin + row;
    const bool inside = token < head.tokens && column < head.width;
    const T* from = head.data + (inside ? token * head.row + column : 0);
    T* to = tile + row * kRow<D> + column;
    if (wide) {
      copy_async(to, from, inside);
    } else {
      Pack<T, 8> pack = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (inside && column + i < head.width) pack.value[i] = from[i];
      }
      *reinterpret_cast<Pack<T, 8>*>(to) = pack;
    }
  }
}

// The warp's 16 M rows of sums, times `factor` of the fragment's rows, through its own rows of a tile to the tokens
// from `begin` on. The tile's rows are not read by any other warp.
template <typename T, int D, int M>
__device__ __forceinline__ void write_rows(const float (&sums)[M][D / 8][4], const float (&factor)[M][2], T* rows,
                                           const Head<T>& head, int begin, bool wide) {
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
        *reinterpret_cast<uint32_t*>(rows + (16 * m + 8 * r + g) * kRow<D> + 8 * n + 2 * t) = pair;
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int item = own_lane(); item < 16 * M * (D / 8); item += 32) {
    const int row = item / (D / 8), column = item % (D / 8) * 8, token = begin + row;
    if (token >= head.tokens || column >= head.width) continue;
    const T* from = rows + row * kRow<D> + column;
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
  for (int row = begin + own_warp(); row < last; row += kTileThreads / 32) {
    for (int column = own_lane(); column < head.width; column += 32) head.data[row * head.row + column] = T{};
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

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

// sums[i, j] += sum over d of a[i, d] b[j, d]: 16 M rows of a, 8 N rows of b.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&sums)[M][N][4], const T* a, const T* b) {
  const int lane = own_lane();
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(left[m], a + (16 * m + lane % 16) * kRow<D> + k + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, b + (8 * n + lane / 16 * 8 + lane % 8) * kRow<D> + k + lane / 8 % 2 * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(sums[m][n], left[m], right[0], right[1]);
        mma<T>(sums[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// sums[i, d] += sum over j of weights[i, j] b[j, d], with the weights rounded to T: 8 N rows of b.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[M][D / 8][4], const float (&weights)[M][N][4],
                                                  const T* b) {
  const int lane = own_lane();
#pragma unroll
  for (int k = 0; k < N; k += 2) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&pair)[4] = weights[m][k + i / 2];
        left[m][i] = pack_pair<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t right[4];
      load_matrices_transposed(right, b + (8 * k + lane % 16) * kRow<D> + d + lane / 16 * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(sums[m][d / 8], left[m], right[0], right[1]);
        mma<T>(sums[m][d / 8 + 1], left[m], right[2], right[3]);
      }
    }
  }
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
