// cpu_avx512.h: tables of cpu_tiles.h's functions for AVX-512, on fp32 words and, with AVX512_BF16, on pairs of bf16.
//
// AVX512_BF16 multiplies two pairs of bf16 and adds both products to an fp32 lane in one instruction: twice the
// arithmetic of fp32 per instruction, half the bytes. It rounds to nearest even and takes subnormals for zeros.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header makes undefined vectors of themselves
#include <immintrin.h>

#include "cpu_tiles.h"
#include "cpu_portable.h"

#define MEGASHEAR_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

namespace megashear {

// Blocks of 16 by 16 in registers: four rounds of shuffles; the columns may end after 8.
MEGASHEAR_AVX512 inline void transpose_16(const Word* from, int64_t from_stride, Word* to, int64_t to_stride,
                                          int64_t columns) {
  const __mmask16 kept = columns < 16 ? 0x00ff : 0xffff;
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) x[r] = _mm512_maskz_loadu_epi32(kept, from + r * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 g + c] holds, in its four quarters q, columns 4 q + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
    y[c] = _mm512_shuffle_i32x4(low, high, 0x88);
    y[8 + c] = _mm512_shuffle_i32x4(low, high, 0xdd);
    y[4 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    y[12 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    if (c < columns) _mm512_storeu_si512(to + c * to_stride, y[c]);
  }
}

namespace avx512 {
MEGASHEAR_AVX512 inline void product(const Product& arguments) { fp32_product<16>(arguments); }
MEGASHEAR_AVX512 inline void softmax(const SoftmaxBlock& block) { softmax_block<16, 1>(block); }
MEGASHEAR_AVX512 inline void gradient(const GradientBlock& block) { gradient_block<16, 1>(block); }
MEGASHEAR_AVX512 inline void transpose(const Word* from, int64_t from_stride, Word* to, int64_t to_stride,
                                       int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; row += 16) {
    for (int64_t column = 0; column < columns; column += 16) {
      transpose_16(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride,
                   columns - column);
    }
  }
}
constexpr Tiles tiles = {"avx512", 1, product, softmax, gradient, transpose};
}  // namespace avx512

#if defined(__clang__) || __GNUC__ >= 11
#define MEGASHEAR_COMPILES_AVX512_BF16
#define MEGASHEAR_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")))

namespace avx512_bf16 {

template <int R, int V>
MEGASHEAR_AVX512_BF16 inline void columns(const Product& product, int64_t lane) {
  for (int64_t row = 0; row < product.rows; row += R) {
    const Word* a = product.a + row * product.a_stride;
    const Word* b = product.b + lane;
    float* c = product.c + row * product.c_stride + lane;
    __m512 sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sums[r][v] = product.add ? _mm512_loadu_ps(c + r * product.c_stride + v * 16) : _mm512_setzero_ps();
      }
    }
    for (int64_t word = 0; word < product.words; ++word) {
      __m512bh right[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + word * product.b_stride + v * 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * product.a_stride + word]));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * product.c_stride + v * 16, sums[r][v]);
    }
  }
}

MEGASHEAR_AVX512_BF16 inline void product(const Product& arguments) {
  int64_t lane = 0;
  for (; lane + 64 <= arguments.lanes; lane += 64) columns<4, 4>(arguments, lane);
  for (; lane + 32 <= arguments.lanes; lane += 32) columns<8, 2>(arguments, lane);
  if (lane < arguments.lanes) columns<8, 1>(arguments, lane);
}

MEGASHEAR_AVX512_BF16 inline void softmax(const SoftmaxBlock& block) { softmax_block<16, 2>(block); }
MEGASHEAR_AVX512_BF16 inline void gradient(const GradientBlock& block) { gradient_block<16, 2>(block); }
constexpr Tiles tiles = {"avx512_bf16", 2, product, softmax, gradient, avx512::transpose};

}  // namespace avx512_bf16
#endif

}  // namespace megashear

#pragma GCC diagnostic pop
#endif
