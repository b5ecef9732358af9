// mma_warpgroup.cuh: tensor core instructions of a warpgroup (four warps, Hopper), one per function.
//
// sm_90a only. The four warps call each function together. Products run in the background: their sums may not be
// touched from the first one to wait_products. What is in the PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions", of operands of 2 bytes:
//   C [64, N]: as mma_warp.cuh's, the warp w of the group (from 0) holding rows 16 w to 16 w + 15; c[n] is columns 8 n
//   A [64, 16]: a warp's rows as mma_warp.cuh's A, or from shared memory
//   tiles in shared memory: columns in blocks of W = 16, 32 or 64, the rows of a block one behind the other, 2 W bytes
//     each. In every 1024 bytes the address bits 4, 5, .. are crossed with bits 7, 8, ..: one, two or three of them. A
//     descriptor names such a block and both distances that lead out of it; addresses and distances in 16 bytes:
//     bits 0 to 13 address, 16 to 29 leading distance, 32 to 45 stride, 62 and 63 the crossing: 3, 2, 1 for W = 16, 32
//     and 64
//     columns multiplied (K-major): the stride is that of 8 rows; 16 columns lie in one block, no leading distance
//     rows multiplied (MN-major): the stride is that of 8 rows, the leading distance that of a block of columns
// So a thread's sums of one product, packed in pairs, are its rows of A for another one.
#pragma once

#include "mma_warp.cuh"

namespace megashear {

// Whether code that is being compiled may have these instructions; on the host, where nothing is generated, yes.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasGroupProducts = false;
#else
constexpr bool kHasGroupProducts = true;
#endif

// The first address from `memory` on at which tiles may begin, a multiple of 1024; less than 1024 bytes are left out.
__device__ __forceinline__ char* aligned_shared(void* memory) {
  return static_cast<char*>(memory) + (-shared_address(memory) & 1023u);
}

// A tile's descriptor: `W` as above; distances in bytes.
template <int W>
__device__ __forceinline__ uint64_t tile_descriptor(const void* address, int leading, int stride) {
  constexpr uint64_t crossing = W == 64 ? 1 : W == 32 ? 2 : 3;
  return static_cast<uint64_t>((shared_address(address) & 0x3ffffu) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | crossing << 62;
}

// Lets products see what this thread has written to shared memory, by stores or by copies that it has waited for; those
// of other threads after a barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes that products will read.
template <typename Value>
__device__ __forceinline__ void store_for_products(void* shared, const Value& value) {
  static_assert(sizeof value == 16);
  *static_cast<Value*>(shared) = value;
}

// Has products wait for what this thread wrote to the registers that they read or add to.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes one group of the products since the last group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last N.
template <int N>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Prevents the compiler from moving reads of sums above a preceding wait.
template <int N>
__device__ __forceinline__ void read_after_wait(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}

#define MEGASHEAR_REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MEGASHEAR_REGISTERS_48 MEGASHEAR_REGISTERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MEGASHEAR_REGISTERS_64 MEGASHEAR_REGISTERS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MEGASHEAR_REGISTERS_80 MEGASHEAR_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MEGASHEAR_REGISTERS_96 MEGASHEAR_REGISTERS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MEGASHEAR_REGISTERS_112 MEGASHEAR_REGISTERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MEGASHEAR_REGISTERS_128 MEGASHEAR_REGISTERS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MEGASHEAR_SUM(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MEGASHEAR_SUMS_32 MEGASHEAR_SUM(0), MEGASHEAR_SUM(1), MEGASHEAR_SUM(2), MEGASHEAR_SUM(3)
#define MEGASHEAR_SUMS_48 MEGASHEAR_SUMS_32, MEGASHEAR_SUM(4), MEGASHEAR_SUM(5)
#define MEGASHEAR_SUMS_64 MEGASHEAR_SUMS_48, MEGASHEAR_SUM(6), MEGASHEAR_SUM(7)
#define MEGASHEAR_SUMS_80 MEGASHEAR_SUMS_64, MEGASHEAR_SUM(8), MEGASHEAR_SUM(9)
#define MEGASHEAR_SUMS_96 MEGASHEAR_SUMS_80, MEGASHEAR_SUM(10), MEGASHEAR_SUM(11)
#define MEGASHEAR_SUMS_112 MEGASHEAR_SUMS_96, MEGASHEAR_SUM(12), MEGASHEAR_SUM(13)
#define MEGASHEAR_SUMS_128 MEGASHEAR_SUMS_112, MEGASHEAR_SUM(14), MEGASHEAR_SUM(15)

#define MEGASHEAR_FROM_SHARED(N, TYPE, A, B, ADD)                                   \
  asm volatile(                                                                     \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"                        \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
      " {" MEGASHEAR_REGISTERS_##N "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n}"       \
      : MEGASHEAR_SUMS_##N                                                          \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

#define MEGASHEAR_FROM_REGISTERS(N, TYPE, A0, A1, A2, A3, B)                        \
  asm volatile(                                                                     \
      "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
      " {" MEGASHEAR_REGISTERS_##N "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" \
      #B ", add, 1, 1, 1;\n}"                                                       \
      : MEGASHEAR_SUMS_##N                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

#define MEGASHEAR_OF_SIZE(INSTRUCTION, N, ...)   \
  if constexpr (kSize == N) {                    \
    if constexpr (std::is_same_v<T, BFloat16>) { \
      INSTRUCTION(N, "bf16", __VA_ARGS__);       \
    } else {                                     \
      INSTRUCTION(N, "f16", __VA_ARGS__);        \
    }                                            \
  }

// c (+)= a b^T over 16 columns: the group's 64 rows of a tile by N rows of another one; `add`: to what c holds, else c
// is written.
template <typename T, int N>
__device__ __forceinline__ void multiply_shared(float (&c)[N][4], uint64_t a, uint64_t b, bool add) {
  constexpr int kSize = 8 * N;
  static_assert(kSize == 32 || kSize == 64 || kSize == 128);
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_SHARED, 32, 16, 17, 18)
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_SHARED, 64, 32, 33, 34)
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_SHARED, 128, 64, 65, 66)
}

// c += a b over 16 rows of a tile: a from registers, N columns of b.
template <typename T, int N>
__device__ __forceinline__ void multiply_registers(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b) {
  constexpr int kSize = 8 * N;
  static_assert(kSize % 16 == 0 && kSize >= 48 && kSize <= 128);
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_REGISTERS, 48, 24, 25, 26, 27, 28)
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_REGISTERS, 64, 32, 33, 34, 35, 36)
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_REGISTERS, 80, 40, 41, 42, 43, 44)
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_REGISTERS, 96, 48, 49, 50, 51, 52)
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_REGISTERS, 112, 56, 57, 58, 59, 60)
  MEGASHEAR_OF_SIZE(MEGASHEAR_FROM_REGISTERS, 128, 64, 65, 66, 67, 68)
}

}  // namespace megashear
