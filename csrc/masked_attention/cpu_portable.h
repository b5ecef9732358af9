// cpu_portable.h: tables of cpu_tiles.h's functions on fp32 words, for AVX-512, AVX2 and any other processor.
#pragma once

#include "cpu_tiles.h"

namespace megashear {

// R rows by V vectors of C stay in registers while the words go by.
template <int W, int R, int V>
MEGASHEAR_ROW void fp32_tile(const Product& product, int64_t row, int64_t lane) {
  using Float = typename Lanes<W>::Float;
  typedef float WordAsFloat __attribute__((may_alias));
  const WordAsFloat* a = reinterpret_cast<const WordAsFloat*>(product.a + row * product.a_stride);
  const Word* b = product.b + lane;
  float* c = product.c + row * product.c_stride + lane;
  Float sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sums[r][v] = Float{};
      if (product.add) load<W>(sums[r][v], c + r * product.c_stride + v * W);
    }
  }
  for (int64_t word = 0; word < product.words; ++word) {
    Float right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) load<W>(right[v], b + word * product.b_stride + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float left = a[r * product.a_stride + word];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<W>(c + r * product.c_stride + v * W, sums[r][v]);
  }
}

template <int W, int R, int V>
MEGASHEAR_ROW void fp32_columns(const Product& product, int64_t lane) {
  for (int64_t row = 0; row < product.rows; row += R) fp32_tile<W, R, V>(product, row, lane);
}

template <int W>
MEGASHEAR_ROW void fp32_product(const Product& product) {
  int64_t lane = 0;
  if constexpr (W == 16) {  // 32 registers
    for (; lane + 64 <= product.lanes; lane += 64) fp32_columns<W, 4, 4>(product, lane);
    for (; lane + 32 <= product.lanes; lane += 32) fp32_columns<W, 8, 2>(product, lane);
    for (; lane < product.lanes; lane += 16) fp32_columns<W, 8, 1>(product, lane);
  } else {  // 16 registers
    for (; lane < product.lanes; lane += 2 * W) fp32_columns<W, 4, 2>(product, lane);
  }
}

MEGASHEAR_ROW void transpose_words(const Word* from, int64_t from_stride, Word* to, int64_t to_stride, int64_t rows,
                                   int64_t columns) {
  typedef Word AnyWord __attribute__((may_alias));
  const AnyWord* source = from;
  for (int64_t row = 0; row < rows; row += 8) {
    for (int64_t column = 0; column < columns; column += 8) {
      for (int64_t c = column; c < column + 8; ++c) {
        AnyWord* target = to + c * to_stride;
        for (int64_t r = row; r < row + 8; ++r) target[r] = source[r * from_stride + c];
      }
    }
  }
}

// One table, and its functions compiled for the instruction set that `target` names.
#define MEGASHEAR_FP32_TILES(set, target, lanes)                                                                    \
  namespace set {                                                                                                   \
  target inline void product(const Product& arguments) { fp32_product<lanes>(arguments); }                          \
  target inline void softmax(const SoftmaxBlock& block) { softmax_block<lanes, 1>(block); }                         \
  target inline void gradient(const GradientBlock& block) { gradient_block<lanes, 1>(block); }                      \
  target inline void transpose(const Word* from, int64_t from_stride, Word* to, int64_t to_stride, int64_t rows,    \
                               int64_t columns) {                                                                   \
    transpose_words(from, from_stride, to, to_stride, rows, columns);                                               \
  }                                                                                                                 \
  constexpr Tiles tiles = {#set, 1, product, softmax, gradient, transpose};                                         \
  }

MEGASHEAR_FP32_TILES(portable, , 4)
#if defined(__x86_64__) && defined(__GNUC__)
MEGASHEAR_FP32_TILES(avx2, __attribute__((target("avx2,fma"))), 8)
#endif

}  // namespace megashear
