// cpu_vectors.h: W fp32 lanes as one value, by the compiler's vector extension: the same lines for every instruction set.
//
// A function of these is inlined into one that is compiled for a set with such vectors (cpu_tiles.h). Vectors go by
// reference, since how they are passed by value depends on the set.
#pragma once

#include "../number.h"
#include "../parallel_cpu.h"

namespace megashear {

// 32 bits of an operand of a product: one fp32, or two bf16 that are neighbours along the contraction, the first low.
using Word = uint32_t;

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef uint32_t Bits __attribute__((vector_size(W * 4)));
  typedef uint16_t Half __attribute__((vector_size(W * 2)));
  // The same in memory, at any address and beside any other type.
  typedef float FloatAt __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint32_t BitsAt __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint16_t HalfAt __attribute__((vector_size(W * 2), aligned(2), may_alias));
};

template <int W>
MEGASHEAR_ROW void load(typename Lanes<W>::Float& lanes, const void* from) {
  lanes = *static_cast<const typename Lanes<W>::FloatAt*>(from);
}

template <int W>
MEGASHEAR_ROW void store(void* to, const typename Lanes<W>::Float& lanes) {
  *static_cast<typename Lanes<W>::FloatAt*>(to) = lanes;
}

constexpr float kLowest = -1e38f;  // below every score; a masked score is twice that, so that its power is 0

// lanes = 2^lanes, exactly 0 below 2^-120; not for lanes above 127. Relative error below 2e-7; NaN stays NaN.
template <int W>
MEGASHEAR_ROW void power_of_two(typename Lanes<W>::Float& lanes) {
  using Float = typename Lanes<W>::Float;
  using Bits = typename Lanes<W>::Bits;
  // x = n + r with |r| <= 1/2: adding 1.5 * 2^23 rounds to n and leaves it in the low bits. 2^r by its minimax series.
  const Float shifted = lanes + 12582912.0f;
  const Float r = lanes - (shifted - 12582912.0f);
  Float series = r * 0.0013276472f + 0.0096755415f;
  series = series * r + 0.055507133f;
  series = series * r + 0.2402212f;
  series = series * r + 0.69314697f;
  series = series * r + 1.0f;
  const Float power = (Float)((Bits)series + ((Bits)shifted << 23));
  lanes = lanes < -120.0f ? Float{} : power;
}

// Two rows of lanes rounded to bf16 (ties away from 0), as words that hold one lane of both, the first row low.
template <int W>
MEGASHEAR_ROW void pair_lanes(typename Lanes<W>::Bits& words, const typename Lanes<W>::Float& low,
                              const typename Lanes<W>::Float& high) {
  using Bits = typename Lanes<W>::Bits;
  words = (((Bits)low + 0x8000u) >> 16) | (((Bits)high + 0x8000u) & 0xffff0000u);
}

}  // namespace megashear
