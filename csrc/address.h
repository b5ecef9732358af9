// address.h: what the binding of every op stands on: tensors come as the integer address of their first element.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace megashear {

namespace py = pybind11;

using Address = uintptr_t;  // 0 for null

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace megashear
