// device_cuda.cu: the current CUDA device runs the kernels if driver and device know the code that was compiled.
#include <cuda_runtime.h>

#include "device.h"

namespace megashear {
namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string device_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // leave no error behind for the next launch
  return cudaGetErrorString(status);
}

}  // namespace megashear
