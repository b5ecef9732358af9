// columns_avx512.h: a row's live columns packed together and spread out again, 16 at a time, by compress and expand.
//
// The index, the same for every row, becomes one bit a column: then a block of 16 needs one load, one instruction and
// one store however its live columns lie. The last elements of a row are moved under a mask: nothing beyond is touched.
#pragma once

#include <vector>

#include "../number.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MEGASHEAR_LIVE_AVX512 1
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header makes undefined vectors of themselves
#include <immintrin.h>

namespace megashear {
namespace live_avx512 {

#define MEGASHEAR_AVX512_LIVE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

inline bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// One word for each 16 columns up to the last live one, bit i for column 16 word + i. Columns ascend.
inline std::vector<uint16_t> column_bits(const int64_t* columns, int64_t count) {
  std::vector<uint16_t> bits(count == 0 ? 0 : columns[count - 1] / 16 + 1);
  for (int64_t j = 0; j < count; ++j) bits[columns[j] / 16] |= static_cast<uint16_t>(1u << columns[j] % 16);
  return bits;
}

// Bits for the first of 16 elements of which `left` are there.
inline __mmask16 first_of(int64_t left) {
  return static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1);
}

MEGASHEAR_AVX512_LIVE inline __m512i load_16(const uint32_t* from, __mmask16 some) {
  return _mm512_maskz_loadu_epi32(some, from);
}
MEGASHEAR_AVX512_LIVE inline __m512i load_16(const uint16_t* from, __mmask16 some) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
}
MEGASHEAR_AVX512_LIVE inline void store_16(uint32_t* to, __mmask16 some, __m512i values) {
  _mm512_mask_storeu_epi32(to, some, values);
}
MEGASHEAR_AVX512_LIVE inline void store_16(uint16_t* to, __mmask16 some, __m512i values) {
  _mm256_mask_storeu_epi16(to, some, _mm512_cvtepi32_epi16(values));
}
MEGASHEAR_AVX512_LIVE inline __m512 widen_16(const float* from, __mmask16 some) {
  return _mm512_maskz_loadu_ps(some, from);
}
MEGASHEAR_AVX512_LIVE inline __m512 widen_16(const BFloat16* from, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(load_16(&from->bits, some), 16));
}
MEGASHEAR_AVX512_LIVE inline __m512 widen_16(const Float16* from, __mmask16 some) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, &from->bits));
}

// to[j] = from[columns[j]]; T: uint16_t or uint32_t.
template <typename T>
MEGASHEAR_AVX512_LIVE void gather_row(const T* from, T* to, const std::vector<uint16_t>& bits) {
  for (size_t word = 0; word < bits.size(); ++word, from += 16) {
    const int found = __builtin_popcount(bits[word]);
    if (found == 0) continue;
    store_16(to, first_of(found), _mm512_maskz_compress_epi32(bits[word], load_16(from, bits[word])));
    to += found;
  }
}

// to[columns[j]] += from[j].
template <typename T>
MEGASHEAR_AVX512_LIVE void add_row(const T* from, float* to, const std::vector<uint16_t>& bits) {
  for (size_t word = 0; word < bits.size(); ++word, to += 16) {
    const int found = __builtin_popcount(bits[word]);
    if (found == 0) continue;
    const __m512 added = _mm512_maskz_expand_ps(bits[word], widen_16(from, first_of(found)));
    _mm512_mask_storeu_ps(to, bits[word], _mm512_add_ps(_mm512_maskz_loadu_ps(bits[word], to), added));
    from += found;
  }
}

}  // namespace live_avx512
}  // namespace megashear

#pragma GCC diagnostic pop
#endif
