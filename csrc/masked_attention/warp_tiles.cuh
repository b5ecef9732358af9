// warp_tiles.cuh: tiles multiplied by each warp separately with mma.sync (sm_80 and later).
//
// Rows are padded by 16 bytes, so that the 16 bytes of eight rows at one column are in different banks. The interface is
// that of warpgroup_tiles.cuh; functions without a counterpart are empty.
#pragma once

#include "tile.cuh"

namespace megashear {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasWarpProducts = false;  // cuda.cu takes the plain kernels there
#else
constexpr bool kHasWarpProducts = true;
#endif

template <typename Element, int D_>
struct WarpTiles {
  using T = Element;
  static constexpr int D = D_, threads = 128, row = D + 8;  // elements from one row of a tile to the next
  static constexpr int spare = 0;        // bytes that may be lost before the first tile
  static constexpr bool groups = false;  // whether four warps multiply their 64 rows together
  static constexpr bool compiled = kHasWarpProducts;

  template <int Rows>
  static constexpr int elements = Rows * row;

  __device__ static __forceinline__ T* begin(void* memory) { return static_cast<T*>(memory); }

  template <int Rows>
  __device__ static __forceinline__ T* at(T* tile, int r, int column) {
    return tile + r * row + column;
  }

  // The rows of a tile from `own`, this warp's first, on: as `multiply` takes them.
  __device__ static __forceinline__ const T* rows_from(const T* tile, int own) { return tile + own * row; }

  __device__ static __forceinline__ void put(T* to, const Pack<T, 8>& pack) {
    *reinterpret_cast<Pack<T, 8>*>(to) = pack;
  }

  // Before a barrier after which tiles are multiplied.
  __device__ static __forceinline__ void show() {}

  // sums[i, j] = sum over d of a[i, d] b[j, d], 8 N rows of b; `a` by `rows_from` of a tile of RowsOfA.
  template <int RowsOfA, int M, int N>
  __device__ static __forceinline__ void multiply(float (&sums)[M][N][4], const T* a, const T* b) {
    const int lane = own_lane();
    clear(sums);
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t left[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) load_matrices(left[m], a + (16 * m + lane % 16) * row + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t right[4];
        load_matrices(right, b + (8 * n + lane / 16 * 8 + lane % 8) * row + k + lane / 8 % 2 * 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma<T>(sums[m][n], left[m], right[0], right[1]);
          mma<T>(sums[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }

  // sums[i, d] += sum over j of weights[i, j] b[j, d], with the weights rounded to T: 8 N rows of b.
  template <int M, int N>
  __device__ static __forceinline__ void add(float (&sums)[M][D / 8][4], const float (&weights)[M][N][4], const T* b) {
    const int lane = own_lane();
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      uint32_t left[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) pack_weights<T>(left[m], weights[m][k], weights[m][k + 1]);
#pragma unroll
      for (int d = 0; d < D; d += 16) {
        uint32_t right[4];
        load_matrices_transposed(right, b + (8 * k + lane % 16) * row + d + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma<T>(sums[m][d / 8], left[m], right[0], right[1]);
          mma<T>(sums[m][d / 8 + 1], left[m], right[2], right[3]);
        }
      }
    }
  }

  // Before sums are read, all that were multiplied since the last time.
  template <typename... Sums>
  __device__ static __forceinline__ void finish(Sums&...) {}
};

}  // namespace megashear
