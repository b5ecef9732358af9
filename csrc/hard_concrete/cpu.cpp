// cpu.cpp: hard concrete samples on the CPU, in chunks that fit the first-level cache.
#include "../parallel_cpu.h"
#include "hard_concrete.h"

namespace megashear {
namespace {

constexpr int64_t kChunk = 1024;

// ---- kernels of one chunk -------------------------------------------------------------------------------------------

MEGASHEAR_MULTIVERSION
void noise_chunk(uint64_t seed, uint32_t step, uint32_t micro_batch, uint32_t granularity, int64_t first,
                 float* __restrict uniform, int64_t units) {
  const NoiseKey noise{seed, step, micro_batch, granularity};
  constexpr uint32_t blocks = kChunk / 4;  // of the whole chunk, even where fewer units are wanted
  uint32_t word[4][blocks];
  for (uint32_t b = 0; b < blocks; ++b) {
    const PhiloxBlock counter = philox_counter(noise, static_cast<uint32_t>(first / 4) + b);
    for (int i = 0; i < 4; ++i) word[i][b] = counter.word[i];
  }
  for (uint32_t round = 0; round < 10; ++round) {
#pragma omp simd
    for (uint32_t b = 0; b < blocks; ++b) {
      const PhiloxBlock next = philox_round({{word[0][b], word[1][b], word[2][b], word[3][b]}}, seed, round);
      word[0][b] = next.word[0];
      word[1][b] = next.word[1];
      word[2][b] = next.word[2];
      word[3][b] = next.word[3];
    }
  }
  for (int64_t i = 0; i < units; ++i) uniform[i] = uniform_from_word(word[i % 4][i / 4]);
}

MEGASHEAR_MULTIVERSION
void sample_chunk(const float* __restrict log_alpha, const float* __restrict uniform, float* __restrict z,
                  float* __restrict slope, int64_t units) {
#pragma omp simd
  for (int64_t i = 0; i < units; ++i) {
    const Sample sample = hard_concrete(log_alpha[i], uniform[i]);
    z[i] = sample.z;
    slope[i] = sample.slope;
  }
}

int64_t chunk_units(int64_t first, int64_t units) { return units - first < kChunk ? units - first : kChunk; }

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void hard_concrete_noise(const NoiseKey& noise, float* uniform, int64_t units, intptr_t executor) {
#pragma omp parallel for num_threads(parallel_threads(executor, units)) schedule(static)
  for (int64_t first = 0; first < units; first += kChunk) {
    noise_chunk(noise.seed, noise.step, noise.micro_batch, noise.granularity, first, uniform + first,
                chunk_units(first, units));
  }
}

void hard_concrete_sample(const float* log_alpha, const float* uniform, const NoiseKey& noise, float* z, float* slope,
                          int64_t units, intptr_t executor) {
#pragma omp parallel for num_threads(parallel_threads(executor, units)) schedule(static)
  for (int64_t first = 0; first < units; first += kChunk) {
    const int64_t count = chunk_units(first, units);
    float drawn[kChunk];
    if (uniform == nullptr) {
      noise_chunk(noise.seed, noise.step, noise.micro_batch, noise.granularity, first, drawn, count);
    }
    sample_chunk(log_alpha + first, uniform == nullptr ? drawn : uniform + first, z + first, slope + first, count);
  }
}

}  // namespace megashear
