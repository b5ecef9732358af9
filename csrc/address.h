// address.h: what the binding of every op stands on: tensors come as the integer address of their first element.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

namespace megashear {

namespace py = pybind11;

using Address = uintptr_t;  // 0 for null

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// A matrix whose rows are contiguous: its address, 0 for null, and the stride of its rows in elements.
using Matrix = std::array<int64_t, 2>;

inline void* at(const Matrix& matrix) { return at(static_cast<Address>(matrix[0])); }

}  // namespace megashear
