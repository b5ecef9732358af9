// faults.cu: kernels with one mistake each, and the same without it, for the machine that should show them; and products
// of matrices whose elements lie as the PTX ISA says.
#include "mma_warp.cuh"

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

// [16, 16] by [16, 8], with the element of every register as the PTX ISA gives it, one i for each.
__global__ void fragments_kernel(const float* in, float* out, bool right) {
  const float *a = in, *b = in + 256;
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  float left[8], below[4], c[4] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
    left[i] = a[row * 16 + (right ? column : 15 - column)];
  }
  for (int i = 0; i < 4; ++i) below[i] = b[(in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)) * 8 + group];
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = pack_pair<BFloat16>(left[2 * i], left[2 * i + 1]);
  mma<BFloat16>(c, words, pack_pair<BFloat16>(below[0], below[1]), pack_pair<BFloat16>(below[2], below[3]));
  for (int i = 0; i < 4; ++i) out[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
}

// Matrix m is rows 8 m to 8 m + 7 of 8 columns, row r from lane r; register m of a thread is row lane / 4, columns
// 2 (lane % 4) and the next, of the matrix or of its transpose.
__global__ void matrices_kernel(float* out, bool plain) {
  extern __shared__ uint4 memory[];
  uint16_t* elements = reinterpret_cast<uint16_t*>(memory);
  for (int i = threadIdx.x; i < 256; i += 32) elements[i] = narrow<BFloat16>(static_cast<float>(i)).bits;
  __syncthreads();
  uint32_t words[4];
  if (plain) {
    load_matrices(words, elements + 8 * threadIdx.x);
  } else {
    load_matrices_transposed(words, elements + 8 * threadIdx.x);
  }
  for (int m = 0; m < 4; ++m) {
    for (int half = 0; half < 2; ++half) {
      const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2 + half;
      out[64 * m + 8 * row + column] = half_of<BFloat16>(words[m], half);
    }
  }
}

__global__ void greedy_kernel(float* out, bool) { out[threadIdx.x] = 1.0f; }

}  // namespace
}  // namespace megashear

// Runs kernel `which` with 64 threads, or one warp; the launch's problem, or an empty string.
EXPORTED const char* run_fault(int which, const float* in, float* out, bool right) {
  using namespace megashear;
  if (which == 0) pass_kernel<<<1, 64>>>(out, right);
  if (which == 1) copy_kernel<<<1, 64, 1024>>>(in, out, right);
  if (which == 2) diverging_kernel<<<1, 64>>>(out, right);
  if (which == 3) ended_kernel<<<1, 64>>>(out, right);
  if (which == 4) rows_kernel<<<1, 64, 4096>>>(out, right);
  if (which == 5) misaligned_kernel<<<1, 64, 1024>>>(out, right);
  if (which == 6) greedy_kernel<<<1, 64, right ? 1024 : 1 << 17>>>(out, right);
  if (which == 7) fragments_kernel<<<1, 32>>>(in, out, right);
  if (which == 8) matrices_kernel<<<1, 32, 512>>>(out, right);
  return cudaGetLastError() == cudaSuccess ? "" : cudaGetErrorString(cudaErrorLaunchFailure);
}
