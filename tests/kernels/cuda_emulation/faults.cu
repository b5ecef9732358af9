// faults.cu: kernels with one mistake each, and the same without it, for the machine that should show them.
#include "mma.cuh"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace megashear {
namespace {

// Each thread passes its number to the thread opposite, with or without a barrier between.
__global__ void pass_kernel(float* out, bool right) {
  __shared__ float numbers[64];
  numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (right) __syncthreads();
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}

// Copies 16 bytes a thread to shared memory and out again, waited for or not.
__global__ void copy_kernel(const float* in, float* out, bool right) {
  extern __shared__ uint4 memory[];
  float* tile = reinterpret_cast<float*>(memory);
  copy_async(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  commit_copies();
  if (right) wait_copies<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = tile[255 - 4 * threadIdx.x - i];
}

__global__ void diverging_kernel(float* out, bool right) {
  if (right || threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncwarp(0xffffff00u);
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

// Half of the last warp has ended when the whole of it is asked for.
__global__ void ended_kernel(float* out, bool right) {
  if (!right && threadIdx.x >= 48) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

// Rows 16 bytes apart lie in all banks, rows 128 bytes apart in the same ones.
__global__ void rows_kernel(float* out, bool right) {
  extern __shared__ uint4 memory[];
  for (int i = threadIdx.x; i < 256; i += 64) memory[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  uint32_t words[4];
  load_matrices(words, reinterpret_cast<const char*>(memory) + (right ? 16 : 128) * (threadIdx.x % 32));
  out[threadIdx.x] = static_cast<float>(words[0]);
}

__global__ void misaligned_kernel(float* out, bool right) {
  extern __shared__ uint4 memory[];
  uint32_t words[4];
  memory[threadIdx.x] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  load_matrices(words, reinterpret_cast<const char*>(memory) + (right ? 0 : 8));
  out[threadIdx.x] = static_cast<float>(words[0]);
}

__global__ void greedy_kernel(float* out, bool) { out[threadIdx.x] = 1.0f; }

}  // namespace
}  // namespace megashear

// Runs kernel `which` with 64 threads; the launch's problem, or an empty string.
EXPORTED const char* run_fault(int which, const float* in, float* out, bool right) {
  using namespace megashear;
  if (which == 0) pass_kernel<<<1, 64>>>(out, right);
  if (which == 1) copy_kernel<<<1, 64, 1024>>>(in, out, right);
  if (which == 2) diverging_kernel<<<1, 64>>>(out, right);
  if (which == 3) ended_kernel<<<1, 64>>>(out, right);
  if (which == 4) rows_kernel<<<1, 64, 4096>>>(out, right);
  if (which == 5) misaligned_kernel<<<1, 64, 1024>>>(out, right);
  if (which == 6) greedy_kernel<<<1, 64, right ? 1024 : 1 << 17>>>(out, right);
  return cudaGetLastError() == cudaSuccess ? "" : cudaGetErrorString(cudaErrorLaunchFailure);
}
