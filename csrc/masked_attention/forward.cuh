// forward.cuh: the forward pass by tensor cores; a block owns 128 queries of one head and walks over tiles of keys.
//
// While one tile of keys and values is worked on, the next one is copied. A warp owns 32 queries, so that it reads each
// key once for two products, or 16 of the 64 of a warpgroup. Softmax is kept as a running peak and sum of each row, in
// powers of two. W: see tile.cuh.
#pragma once

#include "tile.cuh"

namespace megashear {

template <typename W>
struct ForwardShape {
  static constexpr int M = W::groups ? 1 : 2, queries = W::threads / 2 * M, span = W::groups ? 64 : 16 * M;
  static constexpr int blocks = W::groups && W::D <= 96 ? 2 : 1;  // on a multiprocessor, to overlap
  static constexpr int keys = W::groups ? (blocks == 2 ? 64 : 128) : W::D <= 64 ? 64 : 32;
  static constexpr int elements = W::template elements<queries> + 4 * W::template elements<keys>;
  static constexpr int bytes = W::spare + 2 * elements;  // of shared memory
  __device__ static __forceinline__ int span_of(int warp_row) { return W::groups ? warp_row / span * span : warp_row; }
};

template <typename W>
class ForwardRows {
  using T = typename W::T;
  using Shape = ForwardShape<W>;
  static constexpr int D = W::D, M = Shape::M, N = Shape::keys / 8;

 public:
  __device__ __forceinline__ ForwardRows(int query, const int32_t* first, int tokens, float scale)
      : query_(query + own_lane() / 4), scale_(scale) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = query_ + 16 * m + 8 * r;
        first_[m][r] = row < tokens ? first_key(first, row) : 0;
        peak_[m][r] = -kInfinity;
        sum_[m][r] = 0.0f;
      }
    }
    clear(out_);
  }

  // One tile of keys from `key`; q: by rows_from; `some_hidden`: not every query of the warp sees all of them.
  __device__ __forceinline__ void add_keys(const T* q, const T* k, const T* v, int key, bool some_hidden) {
    float scores[M][N][4];
    W::template multiply<Shape::queries>(scores, q, k);
    W::finish(scores);
    if (some_hidden) hide(scores, key);
    softmax(scores);
    W::add(out_, scores, v);
    W::finish(out_);
  }

  // `tile`: of as many rows as the block has queries, for the way out; `own`: this warp's first.
  __device__ __forceinline__ void finish(T* tile, int own, const Head<T>& out, float* lse, float z, bool wide) {
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = sum_[m][r];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        factor[m][r] = z / sum;
        const int row = query_ + 16 * m + 8 * r;
        if (own_lane() % 4 == 0 && row < out.tokens) lse[row] = peak_[m][r] * scale_ + logf(sum);
      }
    }
    write_rows<W, Shape::queries, M>(out_, factor, tile, own, out, query_ - own_lane() / 4, wide);
  }

 private:
  __device__ __forceinline__ void hide(float (&scores)[M][N][4], int key) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = query_ + 16 * m + i / 2 * 8, column = key + 8 * n + own_lane() % 4 * 2 + i % 2;
          if (column > row || column < first_[m][i / 2]) scores[m][n][i] = -kInfinity;
        }
      }
    }
  }

  // Scores to powers of them less the peak; what was summed so far is taken down to the new peak.
  __device__ __forceinline__ void softmax(float (&scores)[M][N][4]) {
    const float scale = scale_ * kLog2e;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float peak = peak_[m][r];
#pragma unroll
        for (int n = 0; n < N; ++n) peak = fmaxf(peak, fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
        const float base = peak == -kInfinity ? 0.0f : peak * scale;  // nothing seen yet
        const float shrink = exp2_fast(fmaf(peak_[m][r], scale, -base));
        float sum = sum_[m][r] * shrink;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], scale, -base));
            sum += scores[m][n][i];
          }
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out_[m][n][2 * r] *= shrink;
          out_[m][n][2 * r + 1] *= shrink;
        }
        peak_[m][r] = peak;
        sum_[m][r] = sum;
      }
    }
  }

  const int query_;  // the first of the fragment's rows
  const float scale_;
  int first_[M][2];
  float peak_[M][2], sum_[M][2];  // of each row; the sum is of this thread's columns alone
  float out_[M][D / 8][4];
};

template <typename W>
__device__ __forceinline__ void forward_block(const AttentionForward& pass, float scale, bool wide) {
  using T = typename W::T;
  using Shape = ForwardShape<W>;
  constexpr int tile = W::template elements<Shape::keys>, keys = Shape::keys;
  extern __shared__ uint4 memory[];
  T* q_tile = W::begin(memory);
  T* k_tiles = q_tile + W::template elements<Shape::queries>;
  T* v_tiles = k_tiles + 2 * tile;
  const AttentionSizes& sizes = pass.sizes;
  const int tokens = static_cast<int>(sizes.tokens), blocks = (tokens + Shape::queries - 1) / Shape::queries;
  const int64_t heads = sizes.batch * sizes.heads, head = blockIdx.x % heads, b = head / sizes.heads;
  const int64_t h = head % sizes.heads, g = h * sizes.groups / sizes.heads;
  const int begin = (blocks - 1 - static_cast<int>(blockIdx.x / heads)) * Shape::queries;  // the longest first
  const int end = min(begin + Shape::queries, tokens);
  const Head<T> out(pass.out, sizes, b, h);
  float* lse = pass.lse + head * tokens;
  const float z = pass.mask == nullptr ? 1.0f : pass.mask[h];
  if (z == 0.0f) {
    write_zeros(out, begin, end);
    for (int row = begin + threadIdx.x; row < end; row += W::threads) lse[row] = 0.0f;
    return;
  }
  const Head<T> k(pass.k, sizes, b, g), v(pass.v, sizes, b, g);
  const int32_t* first = pass.first == nullptr ? nullptr : pass.first + b * tokens;
  const FirstKeys range = first_keys(first, begin, end);
  const int own = own_warp() * 16 * Shape::M, query = begin + own;
  int key = range.least / keys * keys, stage = 0;
  fill_tile<W, Shape::queries>(q_tile, Head<T>(pass.q, sizes, b, h), begin, wide);
  fill_tile<W, keys>(k_tiles, k, key, wide);
  fill_tile<W, keys>(v_tiles, v, key, wide);
  commit_copies();
  ForwardRows<W> rows(query, first, tokens, scale);
  for (; key < end; key += keys, stage ^= 1) {
    wait_copies<0>();
    W::show();
    __syncthreads();  // this tile is here, and nobody reads the other any more
    if (key + keys < end) {
      fill_tile<W, keys>(k_tiles + (stage ^ 1) * tile, k, key + keys, wide);
      fill_tile<W, keys>(v_tiles + (stage ^ 1) * tile, v, key + keys, wide);
      commit_copies();
    }
    if (key >= begin + Shape::span_of(own) + Shape::span) continue;  // above the diagonal
    const bool some_hidden = key + keys - 1 > query || range.greatest > key;
    const T* q_rows = W::rows_from(q_tile, own);
    rows.add_keys(q_rows, k_tiles + stage * tile, v_tiles + stage * tile, key, some_hidden);
  }
  if (Shape::span > 16 * Shape::M) __syncthreads();  // others multiply this warp's rows too
  rows.finish(q_tile, own, out, lse, z, wide);
}

template <typename W>
__global__ void __launch_bounds__(W::threads, ForwardShape<W>::blocks)
    forward_kernel(AttentionForward pass, float scale, bool wide) {
  if constexpr (W::compiled) {
    forward_block<W>(pass, scale, wide);
  } else {
    __trap();  // cuda.cu takes other kernels there
  }
}

}  // namespace megashear
