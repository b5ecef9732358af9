// number.h: storage types and arithmetic of one element, shared by the CPU and CUDA.
//
// Storage types (fp32, bf16, fp16) are widened to fp32 on reading and rounded to nearest even on writing. exp and log
// are the CUDA library's on the device; on the CPU they are short series without branches, so that compilers vectorise
// the loops around them, with a relative error below 3 units in the last place.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MEGASHEAR_INLINE __host__ __device__ __forceinline__
#else
#define MEGASHEAR_INLINE inline __attribute__((always_inline))
#endif

namespace megashear {

// Element types of activations, numbered as in the bindings.
enum class Dtype : int { Float32 = 0, BFloat16 = 1, Float16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Calls `function` with a value of the storage type that `dtype` names.
template <typename Function>
void by_dtype(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::Float32:
      return function(float{});
    case Dtype::BFloat16:
      return function(BFloat16{});
    case Dtype::Float16:
      return function(Float16{});
  }
}

MEGASHEAR_INLINE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

MEGASHEAR_INLINE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

MEGASHEAR_INLINE float widen(float value) { return value; }
MEGASHEAR_INLINE float widen(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

MEGASHEAR_INLINE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t bits = value.bits & 0x7fffu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-24f;
  const uint32_t rebased = (bits << 13) + (bits >= 0x7c00u ? 224u << 23 : 112u << 23);  // infinity and NaN stay so
  const uint32_t magnitude = bits < 0x0400u ? float_bits(subnormal) : rebased;
  return float_from_bits(magnitude | static_cast<uint32_t>(value.bits & 0x8000u) << 16);
#endif
}

template <typename T>
MEGASHEAR_INLINE T narrow(float value);

template <>
MEGASHEAR_INLINE float narrow<float>(float value) {
  return value;
}

template <>
MEGASHEAR_INLINE BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16{static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
#endif
}

template <>
MEGASHEAR_INLINE Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return Float16{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5 has the spacing 2^-24 of fp16's subnormals, so adding it rounds to one of them.
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude >= 0x477ff000u ? special : finite;  // from 65520 on: infinity, or NaN
  return Float16{static_cast<uint16_t>(rounded | ((bits >> 16) & 0x8000u))};
#endif
}

// e^x; x beyond +-87 counts as +-87, which no sigmoid can tell apart in fp32. NaN stays NaN.
MEGASHEAR_INLINE float exponential(float x) {
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // x = n ln 2 + r with |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float series = 1.0f / 5040.0f;
  series = series * r + 1.0f / 720.0f;
  series = series * r + 1.0f / 120.0f;
  series = series * r + 1.0f / 24.0f;
  series = series * r + 1.0f / 6.0f;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return series * float_from_bits((float_bits(shifted) - 0x4b400000u + 127u) << 23);
#endif
}

// ln x for normal positive x.
MEGASHEAR_INLINE float logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh((m - 1) / (m + 1)).
  const uint32_t above = float_bits(x) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(above) >> 23);
  const float m = float_from_bits((above & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  float series = 2.0f / 11.0f;
  series = series * s2 + 2.0f / 9.0f;
  series = series * s2 + 2.0f / 7.0f;
  series = series * s2 + 2.0f / 5.0f;
  series = series * s2 + 2.0f / 3.0f;
  return e * 0.693359375f + (2.0f * s + (s * s2 * series - e * 2.12194440e-4f));
#endif
}

MEGASHEAR_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Column sums (gradients of masks and norm weights) go over tokens in strips: one partial row of sums per strip, then
// a sum over strips in order. The cut depends on the number of tokens alone: results repeat on any number of threads.
constexpr int64_t kMaxStrips = 256;
constexpr int64_t kMinStripTokens = 16;

inline int64_t strip_tokens(int64_t tokens) {
  const int64_t even = (tokens + kMaxStrips - 1) / kMaxStrips;
  return even > kMinStripTokens ? even : kMinStripTokens;
}

inline int64_t strip_count(int64_t tokens) { return (tokens + strip_tokens(tokens) - 1) / strip_tokens(tokens); }

}  // namespace megashear
