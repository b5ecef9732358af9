// warpgroup_tiles.cuh: tiles multiplied by a warpgroup with wgmma (sm_90a).
//
// The four warps of a group own 64 rows, 16 each. Tiles are stored in blocks of columns (mma_warpgroup.cuh), the widest
// that divide the head size: 64 for 64 and 128, 32 for 96, 16 for 48 and 80. Weights come from registers, other operands
// from shared memory.
#pragma once

#include "../mma_warpgroup.cuh"
#include "tile.cuh"

namespace megashear {

template <typename Element, int D_>
struct WarpgroupTiles {
  using T = Element;
  static constexpr int D = D_, threads = 256, spare = 1024;
  static constexpr int width = D % 64 == 0 ? 64 : D % 32 == 0 ? 32 : 16;  // columns of a block
  static constexpr bool groups = true, compiled = kHasGroupProducts;
  static_assert(D % 16 == 0);

  template <int Rows>
  static constexpr int elements = Rows * D;

  __device__ static __forceinline__ T* begin(void* memory) { return reinterpret_cast<T*>(aligned_shared(memory)); }

  // `column` is a multiple of 8 where 16 bytes are meant.
  template <int Rows>
  __device__ static __forceinline__ T* at(T* tile, int row, int column) {
    const int inside = 2 * (row * width + column % width);  // bytes, before the crossing
    const int crossed = inside ^ ((inside >> 7 & (width / 8 - 1)) << 4);
    return tile + column / width * Rows * width + crossed / 2;
  }

  // The group's.
  __device__ static __forceinline__ const T* rows_from(const T* tile, int own) { return tile + own / 64 * 64 * width; }

  __device__ static __forceinline__ void put(T* to, const Pack<T, 8>& pack) { store_for_products(to, pack); }

  __device__ static __forceinline__ void show() { show_to_products(); }

  // As those of WarpTiles; sums are not to be read before `finish`.
  template <int RowsOfA, int M, int N>
  __device__ static __forceinline__ void multiply(float (&sums)[M][N][4], const T* a, const T* b) {
    static_assert(M == 1);
    begin_products();
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      const int block = k / width, inside = k % width;
      const uint64_t left = tile_descriptor<width>(a + block * RowsOfA * width + inside, 16, 16 * width);
      const uint64_t right = tile_descriptor<width>(b + block * 8 * N * width + inside, 16, 16 * width);
      multiply_shared<T>(sums[0], left, right, k > 0);
    }
  }

  template <int M, int N>
  __device__ static __forceinline__ void add(float (&sums)[M][D / 8][4], const float (&weights)[M][N][4], const T* b) {
    static_assert(M == 1);
    uint32_t left[N / 2][4];
#pragma unroll
    for (int k = 0; k < N; k += 2) pack_weights<T>(left[k / 2], weights[0][k], weights[0][k + 1]);
    begin_products();
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      const uint64_t right = tile_descriptor<width>(b + 8 * k * width, 2 * 8 * N * width, 16 * width);
      multiply_registers<T>(sums[0], left[k / 2], right);
    }
  }

  template <typename... Sums>
  __device__ static __forceinline__ void finish(Sums&... sums) {
    commit_products();
    wait_products<0>();
    (read_after_wait(sums[0]), ...);
  }
};

}  // namespace megashear
