// hard_concrete.h: mask noise, the hard concrete sample and its gradient in one pass.
//
//   w      = Philox 4x32-10 (Salmon et al. 2011), counter (unit / 4, granularity, micro_batch, step), word unit % 4
//   u      = clip(2 (w >> 9) + 1, 17, 2^24 - 17) / 2^24                  exact in fp32, inside (1e-6, 1 - 1e-6)
//   s      = sigmoid((ln u - ln(1 - u) + log_alpha) / beta)
//   z      = clip(s (zeta - gamma) + gamma, 0, 1)
//   dz/da  = (zeta - gamma) s (1 - s) / beta strictly inside (0, 1), else exactly 0
#pragma once

#include "../number.h"

namespace megashear {

struct NoiseKey {
  uint64_t seed;
  uint32_t step, micro_batch, granularity;
};

struct Sample {
  float z, slope;
};

MEGASHEAR_INLINE uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// The state of one block of noise: the counter before the first of ten rounds, the noise after the last.
struct PhiloxBlock {
  uint32_t word[4];
};

MEGASHEAR_INLINE PhiloxBlock philox_counter(const NoiseKey& noise, uint32_t block) {
  return {{block, noise.granularity, noise.micro_batch, noise.step}};
}

MEGASHEAR_INLINE PhiloxBlock philox_round(const PhiloxBlock& in, uint64_t seed, uint32_t round) {
  const uint32_t key0 = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
  const uint32_t key1 = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
  return {{high_product(0xCD9E8D57u, in.word[2]) ^ in.word[1] ^ key0, 0xCD9E8D57u * in.word[2],
           high_product(0xD2511F53u, in.word[0]) ^ in.word[3] ^ key1, 0xD2511F53u * in.word[0]}};
}

MEGASHEAR_INLINE float uniform_from_word(uint32_t word) {
  constexpr int32_t least = 17, most = (1 << 24) - 17;
  int32_t numerator = static_cast<int32_t>(2u * (word >> 9) + 1u);
  numerator = numerator < least ? least : numerator;
  numerator = numerator > most ? most : numerator;
  return static_cast<float>(numerator) * 0x1p-24f;
}

MEGASHEAR_INLINE Sample hard_concrete(float log_alpha, float uniform) {
  constexpr float beta = 2.0f / 3.0f, gamma = -0.1f, zeta = 1.1f;
  const float s = sigmoid((logarithm(uniform) - logarithm(1.0f - uniform) + log_alpha) * (1.0f / beta));
  const float stretched = s * (zeta - gamma) + gamma;
  const float slope = s * (1.0f - s) * ((zeta - gamma) / beta);
  const float above = stretched <= 0.0f ? 0.0f : stretched;  // one bound at a time, without branches; NaN stays NaN
  const float slope_above = stretched <= 0.0f ? 0.0f : slope;
  Sample sample;
  sample.z = above >= 1.0f ? 1.0f : above;
  sample.slope = above >= 1.0f ? 0.0f : slope_above;
  return sample;
}

// Launchers, defined by cpu.cpp and cuda.cu. `executor` is the number of threads or the CUDA stream.
// uniform [units] may be null: then the noise is drawn from `noise`. z, slope: fp32 [units].
void hard_concrete_noise(const NoiseKey& noise, float* uniform, int64_t units, intptr_t executor);
void hard_concrete_sample(const float* log_alpha, const float* uniform, const NoiseKey& noise, float* z, float* slope,
                          int64_t units, intptr_t executor);

}  // namespace megashear
