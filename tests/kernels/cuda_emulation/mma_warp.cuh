// mma_warp.cuh: emulation of csrc/mma_warp.cuh, as documented in the PTX ISA.
//
// Sections "Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix" and "cp.async" of the PTX ISA; g
// and t are its groupID = lane / 4 and threadID_in_group = lane % 4.
#pragma once

#include <cuda_runtime.h>

#include "number.h"

namespace megashear {

struct MmaOperands {
  uint32_t a[4], b[2];
};

template <typename T>
float half_of(uint32_t word, int high) {
  return widen(T{static_cast<uint16_t>(high ? word >> 16 : word & 0xffffu)});
}

// Element (row, k) of A is in the thread 4 (row % 8) + k % 8 / 2, register row / 8 + 2 (k / 8); (k, n) of B in the
// thread 4 n + k % 8 / 2, register k / 8; the low half where k is even. C's registers 0, 1 are row g, columns 2t and
// 2t + 1; 2, 3 are row g + 8.
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const MmaOperands own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const emulation::Exchanged<MmaOperands> all(own, 0xffffffffu, {__FILE__, __LINE__});
  const int lane = emulation::machine.current->lane, g = lane / 4, t = lane % 4;
  for (int pair = 0; pair < 4; ++pair) {
    const MmaOperands rows = all[4 * g + pair], left = all[4 * (2 * t) + pair], right = all[4 * (2 * t + 1) + pair];
    for (int step = 0; step < 2; ++step) {
      for (int high = 0; high < 2; ++high) {
        const float upper = half_of<T>(rows.a[2 * step], high), lower = half_of<T>(rows.a[2 * step + 1], high);
        const float first = half_of<T>(left.b[step], high), second = half_of<T>(right.b[step], high);
        c[0] += upper * first;
        c[1] += upper * second;
        c[2] += lower * first;
        c[3] += lower * second;
      }
    }
  }
}

// The lanes 8 m to 8 m + 7 give the addresses of the rows of matrix m, 8 elements of 2 bytes each.
inline emulation::Exchanged<const uint16_t*> matrix_rows(const void* row) {
  emulation::machine.check_shared(row, 16, "ldmatrix");
  const emulation::Exchanged<const uint16_t*> rows(static_cast<const uint16_t*>(row), 0xffffffffu,
                                                   {__FILE__, __LINE__});
  const int lane = emulation::machine.current->lane;
  if (lane % 8 == 0) {
    const uint16_t* of_banks[8] = {};
    for (int i = 0; i < 8; ++i) {
      const uint16_t*& other = of_banks[reinterpret_cast<uintptr_t>(rows[lane + i]) / 16 % 8];
      if (other != nullptr && other != rows[lane + i]) ++emulation::machine.conflicts;
      other = rows[lane + i];
    }
  }
  return rows;
}

// Register m of the thread holds elements 2t and 2t + 1 of row g of matrix m.
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  const emulation::Exchanged<const uint16_t*> rows = matrix_rows(row);
  const int lane = emulation::machine.current->lane, g = lane / 4, t = lane % 4;
  for (int m = 0; m < 4; ++m) {
    words[m] = rows[8 * m + g][2 * t] | static_cast<uint32_t>(rows[8 * m + g][2 * t + 1]) << 16;
  }
}

// With .trans: elements g of rows 2t and 2t + 1.
inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  const emulation::Exchanged<const uint16_t*> rows = matrix_rows(row);
  const int lane = emulation::machine.current->lane, g = lane / 4, t = lane % 4;
  for (int m = 0; m < 4; ++m) {
    words[m] = rows[8 * m + 2 * t][g] | static_cast<uint32_t>(rows[8 * m + 2 * t + 1][g]) << 16;
  }
}

// NaN until waited for.
inline void copy_async(void* shared, const void* global, bool valid) {
  emulation::machine.check_shared(shared, 16, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulation::machine.fail("misaligned address: cp.async");
  std::memset(shared, 0xff, 16);
  emulation::machine.current->copies.back().push_back({shared, global, valid});
}

inline void commit_copies() { emulation::machine.current->copies.emplace_back(); }

template <int N>
void wait_copies() {
  auto& groups = emulation::machine.current->copies;  // the last one is open
  while (groups.size() > N + 1) {
    for (const emulation::Copy& copy : groups.front()) {
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      if (!copy.valid) std::memset(copy.to, 0, 16);
      emulation::machine.hide_from_products(copy.to);
    }
    groups.erase(groups.begin());
  }
}

template <typename T>
uint32_t pack_pair(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

inline float exp2_fast(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0.0f : power;  // .ftz
}

}  // namespace megashear
