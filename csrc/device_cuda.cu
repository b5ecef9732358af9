// device_cuda.cu: check whether the driver and the device support the compiled code.
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
