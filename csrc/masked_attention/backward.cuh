// backward.cuh: the backward pass by tensor cores: one kernel over tiles of queries for dq, one over tiles of keys for
// dk and dv. Both make the probabilities again, so every sum has one owner and one order, without atomic additions.
//
// With z the head's mask, dS = P (z (dout . v) - delta); dq sums scale dS k, dk scale dS q, dv z P dout. The kernel of
// keys makes scores with the keys as rows, so that each product's weights are in registers, and
// the block walks over the heads of its group and their queries. The next tiles are copied while these are worked on.
// A warp owns 32 rows where their sums fit into its registers: what it reads of the others then serves two products. Of
// a warpgroup's 64 rows it owns 16. W: see tile.cuh.
#pragma once

#include "tile.cuh"

namespace megashear {

// Rows that a block owns, 16 M to a warp, and those that it walks over, 8 N at a time.
template <typename W, int M_, int N_>
struct BackwardShape {
  static constexpr int M = M_, N = N_, own = W::threads / 2 * M, others = 8 * N;
  static constexpr int span = W::groups ? 64 : 16 * M;  // rows that are multiplied together
  static constexpr int elements = 2 * W::template elements<own> + 4 * W::template elements<others>;
  static constexpr int bytes = W::spare + 2 * elements + 4 * 4 * others;
  __device__ static __forceinline__ int span_of(int warp_row) { return W::groups ? warp_row / span * span : warp_row; }
};

template <typename W>
using QueryShape = BackwardShape<W, W::groups ? 1 : 2, W::groups ? 8 : 4>;

// Two sums, scores and slopes do not fit into a warp's registers otherwise.
template <typename W>
using KeyShape = BackwardShape<W, !W::groups && W::D <= 64 ? 2 : 1, W::groups ? 8 : W::D <= 64 ? 2 : 4>;

// Scores in place of P, and dout . v in place of dS, for one row's or column's logarithm and delta.
__device__ __forceinline__ void to_gradient(float& score, float& slope, float scale, float lse2, float delta, float z) {
  score = exp2_fast(fmaf(score, scale, -lse2));
  slope = score * fmaf(z, slope, -delta);
}

// Sums of 16 M rows, all times `factor`, as write_rows of tile.cuh.
template <typename W, int Rows, int M, typename T>
__device__ __forceinline__ void write_gradient(const float (&sums)[M][W::D / 8][4], float factor, T* tile, int row,
                                               const Head<T>& head, int begin, bool wide) {
  float factors[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) factors[m][0] = factors[m][1] = factor;
  write_rows<W, Rows, M>(sums, factors, tile, row, head, begin, wide);
}

// ---- queries --------------------------------------------------------------------------------------------------------

// Logarithms, in powers of two, and deltas of a fragment's rows.
template <int M>
struct RowNumbers {
  float lse2[M][2], delta[M][2];

  __device__ __forceinline__ RowNumbers(const float* lse, const float* deltas, int query, int tokens) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int own = query + 16 * m + 8 * r;
        lse2[m][r] = own < tokens ? lse[own] * kLog2e : 0.0f;
        delta[m][r] = own < tokens ? deltas[own] : 0.0f;
      }
    }
  }
};

// to_gradient of queries as rows, from `query`, and keys as columns, from `key`.
template <int M, int N>
__device__ __forceinline__ void query_slopes(float (&p)[M][N][4], float (&ds)[M][N][4], const RowNumbers<M>& rows,
                                             int query, int key, float scale2, float z, bool some_hidden,
                                             const AttentionForward& pass, int b) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = query + 16 * m + i / 2 * 8, column = key + 8 * n + own_lane() % 4 * 2 + i % 2;
        if (some_hidden && !sees(pass, b, row, column)) p[m][n][i] = -kInfinity;
        to_gradient(p[m][n][i], ds[m][n][i], scale2, rows.lse2[m][i / 2], rows.delta[m][i / 2], z);
      }
    }
  }
}

template <typename W>
__device__ __forceinline__ void query_gradient_block(const AttentionBackward& pass, const float* delta, float scale,
                                                     bool wide) {
  using T = typename W::T;
  using Shape = QueryShape<W>;
  constexpr int M = Shape::M, N = Shape::N, others = Shape::others, tile = W::template elements<others>;
  extern __shared__ uint4 memory[];
  T* q_tile = W::begin(memory);
  T* dout_tile = q_tile + W::template elements<Shape::own>;
  T* k_tiles = dout_tile + W::template elements<Shape::own>;
  T* v_tiles = k_tiles + 2 * tile;
  const AttentionForward& forward = pass.forward;
  const AttentionSizes& sizes = forward.sizes;
  const int tokens = static_cast<int>(sizes.tokens), blocks = (tokens + Shape::own - 1) / Shape::own;
  const unsigned heads = static_cast<unsigned>(sizes.heads), all_heads = static_cast<unsigned>(sizes.batch) * heads;
  const int b = static_cast<int>(blockIdx.x % all_heads / heads), h = static_cast<int>(blockIdx.x % heads);
  const int64_t group = h * sizes.groups / sizes.heads, row_numbers = (b * sizes.heads + h) * sizes.tokens;
  const int begin = (blocks - 1 - static_cast<int>(blockIdx.x / all_heads)) * Shape::own;  // the longest first
  const int end = min(begin + Shape::own, tokens);
  const Head<T> dq(pass.dq, sizes, b, h);
  const float z = forward.mask == nullptr ? 1.0f : forward.mask[h];
  if (z == 0.0f) return write_zeros(dq, begin, end);
  const FirstKeys range = first_keys(first_of(forward, b), begin, end);
  const auto fill_others = [&](int from, int stage) {  // heads are made again at each use, since registers are short
    fill_tile<W, others>(k_tiles + stage * tile, Head<T>(forward.k, sizes, b, group), from, wide);
    fill_tile<W, others>(v_tiles + stage * tile, Head<T>(forward.v, sizes, b, group), from, wide);
    commit_copies();
  };
  int key = range.least / others * others, stage = 0;
  fill_tile<W, Shape::own>(q_tile, Head<T>(forward.q, sizes, b, h), begin, wide);
  fill_tile<W, Shape::own>(dout_tile, Head<T>(pass.dout, sizes, b, h), begin, wide);
  fill_others(key, 0);
  const int warp_row = own_warp() * 16 * M, row = begin + warp_row + own_lane() / 4;
  const RowNumbers<M> rows(forward.lse + row_numbers, delta + row_numbers, row, tokens);
  float sums[M][W::D / 8][4];
  clear(sums);
  for (; key < end; key += others, stage ^= 1) {
    wait_copies<0>();
    W::show();
    __syncthreads();  // these tiles are here, and nobody reads the others any more
    if (key + others < end) fill_others(key + others, stage ^ 1);
    if (key >= begin + Shape::span_of(warp_row) + Shape::span) continue;  // above the diagonal
    float p[M][N][4], ds[M][N][4];
    W::template multiply<Shape::own>(p, W::rows_from(q_tile, warp_row), k_tiles + stage * tile);
    W::template multiply<Shape::own>(ds, W::rows_from(dout_tile, warp_row), v_tiles + stage * tile);
    W::finish(p, ds);
    const bool some_hidden = key + others - 1 > begin + warp_row || range.greatest > key;
    query_slopes(p, ds, rows, row, key, scale * kLog2e, z, some_hidden, forward, b);
    W::add(sums, ds, k_tiles + stage * tile);
    W::finish(sums);
  }
  if (Shape::span > 16 * M) __syncthreads();  // others multiply this warp's rows too
  write_gradient<W, Shape::own, M>(sums, scale, q_tile, warp_row, dq, begin + warp_row, wide);
}

template <typename W>
__global__ void __launch_bounds__(W::threads)
    query_gradient_kernel(AttentionBackward pass, const float* delta, float scale, bool wide) {
  if constexpr (W::compiled) {
    query_gradient_block<W>(pass, delta, scale, wide);
  } else {
    __trap();  // cuda.cu takes other kernels there
  }
}

// ---- keys -----------------------------------------------------------------------------------------------------------

// The tiles of queries that see the keys [key, key + Keys): head after head of a group, those of mask 0 left out.
template <int Queries, int Keys>
struct QueryTiles {
  const AttentionForward& pass;
  int b, group, key, head, query, greatest_first;

  __device__ __forceinline__ QueryTiles(const AttentionForward& pass_, int b_, int group_, int key_)
      : pass(pass_), b(b_), group(group_), key(key_), head(group_ * queries()), query(key_ / Queries * Queries) {
    find();
  }

  __device__ __forceinline__ int queries() const { return static_cast<int>(pass.sizes.heads / pass.sizes.groups); }
  __device__ __forceinline__ int tokens() const { return static_cast<int>(pass.sizes.tokens); }
  __device__ __forceinline__ bool more() const { return head < (group + 1) * queries(); }
  __device__ __forceinline__ float mask() const { return pass.mask == nullptr ? 1.0f : pass.mask[head]; }

  // To the first tile from here on that sees a key.
  __device__ __forceinline__ void find() {
    for (; more(); ++head, query = key / Queries * Queries) {
      if (mask() == 0.0f) continue;
      for (; query < tokens(); query += Queries) {
        const FirstKeys range = first_keys(first_of(pass, b), query, min(query + Queries, tokens()));
        greatest_first = range.greatest;
        if (range.least < key + Keys) return;
      }
    }
  }

  __device__ __forceinline__ void advance() {
    query += Queries;
    find();
  }
};

// Logarithms and deltas of a tile's queries, in shared memory; one more thread a number.
template <int Queries>
__device__ __forceinline__ void fill_rows(float* lse2, const float* lse, const float* delta, int query, int tokens) {
  static_assert(2 * Queries <= 128);  // threads of a block, or more
  const int i = threadIdx.x % Queries;
  const bool here = query + i < tokens;
  if (threadIdx.x < Queries) lse2[i] = here ? lse[query + i] * kLog2e : 0.0f;
  if (threadIdx.x / Queries == 1) lse2[Queries + i] = here ? delta[query + i] : 0.0f;
}

// The same of keys as rows, from `key`, and queries as columns, from `query`; then p is times z. lse2: as fill_rows.
template <int M, int N>
__device__ __forceinline__ void key_slopes(float (&p)[M][N][4], float (&ds)[M][N][4], const float* lse2, int key,
                                           int query, float scale2, float z, bool some_hidden,
                                           const AttentionForward& pass, int b) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4 * M; ++i) {
      const int m = i / 4, row = key + 16 * m + i % 4 / 2 * 8, column = 8 * n + own_lane() % 4 * 2 + i % 2;
      float &score = p[m][n][i % 4], &slope = ds[m][n][i % 4];
      if (some_hidden && !sees(pass, b, query + column, row)) score = -kInfinity;
      to_gradient(score, slope, scale2, lse2[column], lse2[8 * N + column], z);
      score *= z;
    }
  }
}

template <typename W>
__device__ __forceinline__ void key_gradient_block(const AttentionBackward& pass, const float* delta, float scale,
                                                   bool wide) {
  using T = typename W::T;
  using Shape = KeyShape<W>;
  constexpr int Q = Shape::others, tile = W::template elements<Q>, M = Shape::M, N = Shape::N;
  extern __shared__ uint4 memory[];
  T* k_tile = W::begin(memory);
  T* v_tile = k_tile + W::template elements<Shape::own>;
  T* q_tiles = v_tile + W::template elements<Shape::own>;
  T* dout_tiles = q_tiles + 2 * tile;
  float* row_tiles = reinterpret_cast<float*>(dout_tiles + 2 * tile);
  const AttentionForward& forward = pass.forward;
  const AttentionSizes& sizes = forward.sizes;
  const int tokens = static_cast<int>(sizes.tokens);
  const unsigned groups = static_cast<unsigned>(sizes.groups), all_groups = static_cast<unsigned>(sizes.batch) * groups;
  const int b = static_cast<int>(blockIdx.x % all_groups / groups), group = static_cast<int>(blockIdx.x % groups);
  const int begin = static_cast<int>(blockIdx.x / all_groups) * Shape::own;  // the longest first
  const int warp_row = own_warp() * 16 * M, row = begin + warp_row + own_lane() / 4;
  const auto fill = [&](const QueryTiles<Q, Shape::own>& at, int stage) {
    const int64_t rows = (b * sizes.heads + at.head) * sizes.tokens;
    fill_tile<W, Q>(q_tiles + stage * tile, Head<T>(forward.q, sizes, b, at.head), at.query, wide);
    fill_tile<W, Q>(dout_tiles + stage * tile, Head<T>(pass.dout, sizes, b, at.head), at.query, wide);
    fill_rows<Q>(row_tiles + stage * 2 * Q, forward.lse + rows, delta + rows, at.query, tokens);
    commit_copies();
  };
  fill_tile<W, Shape::own>(k_tile, Head<T>(forward.k, sizes, b, group), begin, wide);
  fill_tile<W, Shape::own>(v_tile, Head<T>(forward.v, sizes, b, group), begin, wide);
  QueryTiles<Q, Shape::own> next(forward, b, group, begin);
  if (next.more()) fill(next, 0);
  float dk[M][W::D / 8][4], dv[M][W::D / 8][4];
  clear(dk);
  clear(dv);
  for (int stage = 0; next.more(); stage ^= 1) {
    const int first_query = next.query, hidden_until = next.greatest_first;
    const float z = next.mask();
    wait_copies<0>();
    W::show();
    __syncthreads();  // these tiles are here, and nobody reads the others any more
    next.advance();
    if (next.more()) fill(next, stage ^ 1);
    if (begin + Shape::span_of(warp_row) >= first_query + Q) continue;  // above the diagonal
    const T *q = q_tiles + stage * tile, *dout = dout_tiles + stage * tile;
    float p[M][N][4], ds[M][N][4];
    W::template multiply<Shape::own>(p, W::rows_from(k_tile, warp_row), q);
    W::template multiply<Shape::own>(ds, W::rows_from(v_tile, warp_row), dout);
    W::finish(p, ds);
    const bool some_hidden = begin + warp_row + 16 * M - 1 > first_query || hidden_until > begin;
    const float* numbers = row_tiles + stage * 2 * Q;
    key_slopes(p, ds, numbers, row, first_query, scale * kLog2e, z, some_hidden, forward, b);
    W::add(dv, p, dout);
    W::add(dk, ds, q);
    W::finish(dv, dk);
  }
  commit_copies();
  wait_copies<0>();  // of the keys, where no query was live
  __syncthreads();
  const int to = begin + warp_row;
  write_gradient<W, Shape::own, M>(dk, scale, k_tile, warp_row, Head<T>(pass.dk, sizes, b, group), to, wide);
  write_gradient<W, Shape::own, M>(dv, 1.0f, k_tile, warp_row, Head<T>(pass.dv, sizes, b, group), to, wide);
}

template <typename W>
__global__ void __launch_bounds__(W::threads, W::groups ? 1 : 2)
    key_gradient_kernel(AttentionBackward pass, const float* delta, float scale, bool wide) {
  if constexpr (W::compiled) {
    key_gradient_block<W>(pass, delta, scale, wide);
  } else {
    __trap();  // cuda.cu takes other kernels there
  }
}

}  // namespace megashear
