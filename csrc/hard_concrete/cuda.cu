// cuda.cu: hard concrete samples on CUDA; one thread makes the four units of one block of noise.
#include "../cuda_launch.cuh"
#include "hard_concrete.h"

namespace megashear {
namespace {

// ---- kernels --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ PhiloxBlock philox(const NoiseKey& noise, int64_t block) {
  PhiloxBlock state = philox_counter(noise, static_cast<uint32_t>(block));
#pragma unroll
  for (uint32_t round = 0; round < 10; ++round) state = philox_round(state, noise.seed, round);
  return state;
}

__global__ void noise_kernel(NoiseKey noise, float* uniform, int64_t units) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const PhiloxBlock drawn = philox(noise, block);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * block + i < units) uniform[4 * block + i] = uniform_from_word(drawn.word[i]);
  }
}

// uniform: null to draw the noise here.
__global__ void sample_kernel(const float* log_alpha, const float* uniform, NoiseKey noise, float* z, float* slope,
                              int64_t units) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const PhiloxBlock drawn = philox(noise, block);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t unit = 4 * block + i;
    if (unit < units) {
      const float u = uniform == nullptr ? uniform_from_word(drawn.word[i]) : uniform[unit];
      const Sample sample = hard_concrete(log_alpha[unit], u);
      z[unit] = sample.z;
      slope[unit] = sample.slope;
    }
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void hard_concrete_noise(const NoiseKey& noise, float* uniform, int64_t units, intptr_t executor) {
  if (units == 0) return;
  noise_kernel<<<blocks_for(units, 4 * kThreads), kThreads, 0, stream_of(executor)>>>(noise, uniform, units);
  check_launch("hard_concrete noise");
}

void hard_concrete_sample(const float* log_alpha, const float* uniform, const NoiseKey& noise, float* z, float* slope,
                          int64_t units, intptr_t executor) {
  if (units == 0) return;
  const unsigned blocks = blocks_for(units, 4 * kThreads);
  sample_kernel<<<blocks, kThreads, 0, stream_of(executor)>>>(log_alpha, uniform, noise, z, slope, units);
  check_launch("hard_concrete sample");
}

}  // namespace megashear
