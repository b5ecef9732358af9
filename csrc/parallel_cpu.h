// parallel_cpu.h: threads and vector instructions of the CPU kernels.
//
// A kernel is a loop over rows shared by OpenMP threads, around a function of one row. MEGASHEAR_MULTIVERSION compiles
// such a row function for several instruction sets and picks one by the processor's features when the library is loaded
// (not by its name: arch=haswell would exclude every AMD); the rest of the code stays at the compiler's portable
// baseline, so one build runs on any machine of its architecture.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && __GNUC__ >= 12
#define MEGASHEAR_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define MEGASHEAR_MULTIVERSION __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define MEGASHEAR_MULTIVERSION
#endif

#define MEGASHEAR_ROW inline __attribute__((always_inline))

namespace megashear {

constexpr int64_t kSerialElements = 16384;  // below this, waking threads costs more than it saves

// Number of threads for work on `elements` elements.
inline int parallel_threads(intptr_t requested, int64_t elements) {
  return elements < kSerialElements || requested < 1 ? 1 : static_cast<int>(requested);
}

// total[c] = sum over strips, in order, of partial[strip, c].
inline void sum_strips(const float* partial, float* total, int64_t strips, int64_t columns, int threads) {
  constexpr int64_t chunk = 256;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t begin = 0; begin < columns; begin += chunk) {
    const int64_t end = begin + chunk < columns ? begin + chunk : columns;
    for (int64_t c = begin; c < end; ++c) total[c] = 0.0f;
    for (int64_t strip = 0; strip < strips; ++strip) {
      for (int64_t c = begin; c < end; ++c) total[c] += partial[strip * columns + c];
    }
  }
}

}  // namespace megashear
