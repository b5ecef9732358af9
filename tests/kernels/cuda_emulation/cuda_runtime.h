// cuda_runtime.h: the part of CUDA C++ that our kernels use, for g++; `<<<...>>>` and __shared__ are rewritten before.
#pragma once

#include <cmath>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// ---- threads --------------------------------------------------------------------------------------------------------

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::machine.wait(emulation::State::AtBlock, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::machine.wait(emulation::State::AtWarp, {file, line}, mask);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const emulation::Exchanged<T> all(value, mask, {file, line});
  return all[emulation::machine.current->lane ^ bits];
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const emulation::Exchanged<T> all(value, mask, {file, line});
  return all[lane & 31];
}

inline void __trap() { emulation::machine.fail("__trap"); }

// ---- memory and arithmetic ------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
void __stwb(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) emulation::machine.fail("misaligned address: __stwb");
  *address = value;
}

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

// ---- the host's side ------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion, numRegs;
};
using cudaStream_t = struct Stream*;

namespace emulation {
inline std::string last_problem;
}

inline cudaError_t cudaGetLastError() {
  if (emulation::machine.problem.empty()) return cudaSuccess;
  emulation::last_problem = std::move(emulation::machine.problem);
  emulation::machine.problem.clear();
  return cudaErrorLaunchFailure;
}

inline const char* cudaGetErrorString(cudaError_t) { return emulation::last_problem.c_str(); }

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {90, 90, 255};  // sm_90a, with every kernel that there is for it
  return cudaSuccess;
}

// Taken to be meant for the next launch.
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  emulation::machine.shared_allowed = static_cast<size_t>(bytes);
  return cudaSuccess;
}

namespace emulation {

// `call` calls the kernel: generic, since a kernel's template arguments may be deduced.
template <typename Call>
struct Launch {
  Call call;
  dim3 grid, block;
  size_t shared;

  template <typename... Arguments>
  void operator()(Arguments... arguments) const {
    const size_t allowed = std::max(machine.shared_allowed, kSharedByDefault);
    machine.shared_allowed = 0;
    if (shared > std::min(allowed, kSharedAtMost)) machine.problem = "too much shared memory";
    if (machine.problem.empty()) machine.run(grid, block, shared, [&] { call(arguments...); });
  }
};

template <typename Call>
Launch<Call> launch(Call call, dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr) {
  return {call, grid, block, shared};
}

}  // namespace emulation
