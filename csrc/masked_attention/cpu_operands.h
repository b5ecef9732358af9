// cpu_operands.h: tensors in memory <-> operands of products, in words (cpu_tiles.h), padded by zeros to whole blocks and steps.
//
// A block of kBlock tokens of one head takes one of four forms, `padded` being the head size rounded up to kStep:
//   rows     [kBlock, padded / pair]   words along the head size
//   columns  [padded / pair, kBlock]   the same, transposed
//   pairs    [kBlock / pair, padded]   words along the tokens
//   turned   [padded, kBlock / pair]   the same, transposed
// To be included once, by cpu.cpp.
#pragma once

#include <type_traits>

#include "masked_attention.h"
#include "cpu_tiles.h"

namespace megashear {

inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// ---- loops over the elements of a block -----------------------------------------------------------------------------

// Asks for the row some tokens ahead: rows are far apart where tokens come first, so no hardware foresees them.
template <typename T>
MEGASHEAR_ROW void prefetch_ahead(const T* row, int64_t stride, int64_t width, int64_t left) {
  constexpr int64_t kAhead = 6;
  if (left <= kAhead) return;
  const char* ahead = reinterpret_cast<const char*>(row + kAhead * stride);
  for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(ahead + byte);
}

template <typename T, typename Element>
MEGASHEAR_ROW void copy_in(const T* from, int64_t stride, Element* to, int64_t padded, int64_t tokens, int64_t width,
                           float factor) {
  for (int64_t t = 0; t < kBlock; ++t, to += padded) {
    const int64_t filled = t < tokens ? width : 0;
    const T* row = from + t * stride;
    prefetch_ahead(row, stride, filled, tokens - t);
    if (std::is_same<T, Element>::value && factor == 1.0f) {
      std::memcpy(to, row, static_cast<size_t>(filled) * sizeof(T));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < filled; ++c) to[c] = narrow<Element>(widen(row[c]) * factor);
    }
    if (filled < padded) std::memset(to + filled, 0, static_cast<size_t>(padded - filled) * sizeof(Element));
  }
}

MEGASHEAR_MULTIVERSION void copy_fp32(const float* from, int64_t stride, float* to, int64_t padded, int64_t tokens,
                                      int64_t width, float factor) {
  copy_in(from, stride, to, padded, tokens, width, factor);
}
MEGASHEAR_MULTIVERSION void copy_widened(const BFloat16* from, int64_t stride, float* to, int64_t padded,
                                         int64_t tokens, int64_t width, float factor) {
  copy_in(from, stride, to, padded, tokens, width, factor);
}
MEGASHEAR_MULTIVERSION void copy_bf16(const BFloat16* from, int64_t stride, BFloat16* to, int64_t padded,
                                      int64_t tokens, int64_t width, float factor) {
  copy_in(from, stride, to, padded, tokens, width, factor);
}

MEGASHEAR_MULTIVERSION void interleave(const uint16_t* rows, Word* pairs, int64_t padded) {
  for (int64_t t = 0; t < kBlock; t += 2, rows += 2 * padded, pairs += padded) {
#pragma omp simd
    for (int64_t c = 0; c < padded; ++c) pairs[c] = rows[c] | static_cast<Word>(rows[padded + c]) << 16;
  }
}

template <typename T>
MEGASHEAR_ROW void copy_out(const float* from, int64_t from_stride, const float* factor, T* to, int64_t stride,
                            int64_t tokens, int64_t width) {
  for (int64_t t = 0; t < tokens; ++t) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) to[t * stride + c] = narrow<T>(from[t * from_stride + c] * factor[t]);
  }
}

MEGASHEAR_MULTIVERSION void write_fp32(const float* from, int64_t from_stride, const float* factor, float* to,
                                       int64_t stride, int64_t tokens, int64_t width) {
  copy_out(from, from_stride, factor, to, stride, tokens, width);
}
MEGASHEAR_MULTIVERSION void write_bf16(const float* from, int64_t from_stride, const float* factor, BFloat16* to,
                                       int64_t stride, int64_t tokens, int64_t width) {
  copy_out(from, from_stride, factor, to, stride, tokens, width);
}

template <typename T>
MEGASHEAR_ROW void dot_rows(const T* left, int64_t left_stride, const T* right, int64_t right_stride, float* dot,
                            int64_t tokens, int64_t width) {
  for (int64_t t = 0; t < tokens; ++t) {
    float sum = 0.0f;
    prefetch_ahead(left + t * left_stride, left_stride, width, tokens - t);
    prefetch_ahead(right + t * right_stride, right_stride, width, tokens - t);
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < width; ++c) sum += widen(left[t * left_stride + c]) * widen(right[t * right_stride + c]);
    dot[t] = sum;
  }
}

MEGASHEAR_MULTIVERSION void dot_fp32(const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                                     float* dot, int64_t tokens, int64_t width) {
  dot_rows(left, left_stride, right, right_stride, dot, tokens, width);
}
MEGASHEAR_MULTIVERSION void dot_bf16(const BFloat16* left, int64_t left_stride, const BFloat16* right,
                                     int64_t right_stride, float* dot, int64_t tokens, int64_t width) {
  dot_rows(left, left_stride, right, right_stride, dot, tokens, width);
}

// Multiplies each lane of `padded` rows of lanes with its factor.
MEGASHEAR_MULTIVERSION void scale_lanes(float* rows, const float* factor, int64_t padded, int64_t lanes) {
  for (int64_t row = 0; row < padded; ++row) {
#pragma omp simd
    for (int64_t lane = 0; lane < lanes; ++lane) rows[row * kBlock + lane] *= factor[lane];
  }
}

// ---- blocks of tensors ----------------------------------------------------------------------------------------------

// The `tokens` tokens from `begin` of one head of a tensor.
struct Rows {
  const AttentionTensor& tensor;
  Dtype dtype;
  int64_t b, h, begin, tokens, width;

  template <typename T>
  T* as() const {
    return static_cast<T*>(tensor.data) + b * tensor.batch + h * tensor.head + begin * tensor.token;
  }
};

inline void read_rows(const Rows& from, const Tiles& tiles, float factor, Word* rows) {
  const int64_t padded = rounded_up(from.width, kStep), stride = from.tensor.token;
  if (from.dtype == Dtype::Float32) {
    copy_fp32(from.as<float>(), stride, reinterpret_cast<float*>(rows), padded, from.tokens, from.width, factor);
  } else if (tiles.pair == 1) {
    copy_widened(from.as<BFloat16>(), stride, reinterpret_cast<float*>(rows), padded, from.tokens, from.width, factor);
  } else {
    copy_bf16(from.as<BFloat16>(), stride, reinterpret_cast<BFloat16*>(rows), padded, from.tokens, from.width, factor);
  }
}

// The block's other forms, each where it is asked for; turned needs pairs.
inline void rearrange(const Word* rows, int64_t padded, const Tiles& tiles, Word* columns, Word* pairs, Word* turned) {
  const int64_t row_words = padded / tiles.pair, pair_rows = kBlock / tiles.pair;
  if (columns != nullptr) tiles.transpose(rows, row_words, columns, kBlock, kBlock, row_words);
  if (pairs != nullptr && tiles.pair == 2) {
    interleave(reinterpret_cast<const uint16_t*>(rows), pairs, padded);
  } else if (pairs != nullptr) {
    std::memcpy(pairs, rows, static_cast<size_t>(kBlock * padded) * sizeof(Word));
  }
  if (turned != nullptr) tiles.transpose(pairs, padded, turned, pair_rows, pair_rows, padded);
}

inline void write_rows(const float* from, int64_t from_stride, const float* factor, const Rows& to) {
  if (to.dtype == Dtype::Float32) {
    write_fp32(from, from_stride, factor, to.as<float>(), to.tensor.token, to.tokens, to.width);
  } else {
    write_bf16(from, from_stride, factor, to.as<BFloat16>(), to.tensor.token, to.tokens, to.width);
  }
}

inline void write_zeros(const Rows& to) {
  for (int64_t t = 0; t < to.tokens; ++t) {
    if (to.dtype == Dtype::Float32) {
      std::memset(to.as<float>() + t * to.tensor.token, 0, static_cast<size_t>(to.width) * sizeof(float));
    } else {
      std::memset(to.as<BFloat16>() + t * to.tensor.token, 0, static_cast<size_t>(to.width) * sizeof(BFloat16));
    }
  }
}

// dot[t] = sum over the head size of left[t] right[t]
inline void dot(const Rows& left, const Rows& right, float* dot) {
  const int64_t ls = left.tensor.token, rs = right.tensor.token;
  if (left.dtype == Dtype::Float32) {
    dot_fp32(left.as<float>(), ls, right.as<float>(), rs, dot, left.tokens, left.width);
  } else {
    dot_bf16(left.as<BFloat16>(), ls, right.as<BFloat16>(), rs, dot, left.tokens, left.width);
  }
}

}  // namespace megashear
