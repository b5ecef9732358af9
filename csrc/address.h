// address.h: checks that every binding applies to its arguments before it calls a kernel.
//
// Tensors travel as the integer address of their first element, so that the libraries need no torch. A null, misaligned
// or impossible address, a negative size or stride, and an unknown dtype raise ValueError with the op and the argument.
// Whether a valid-looking address belongs to a tensor that is large enough cannot be checked here.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "number.h"

namespace megashear {

namespace py = pybind11;

using Address = uintptr_t;  // 0 for null

// A matrix whose rows are contiguous: its address, 0 for null, and the stride of its rows in elements.
using Matrix = std::array<int64_t, 2>;

// A tensor of four dimensions whose last one is contiguous: its address and the strides of the others in elements.
using Strided = std::array<int64_t, 4>;

struct NamedSize {
  const char* name;
  int64_t value;
};

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::Float32 ? 4 : 2; }

// Checks the arguments of one call of `op`. std::invalid_argument becomes Python's ValueError.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  [[noreturn]] void fail(const std::string& argument, const std::string& problem) const {
    throw std::invalid_argument(std::string(op_) + ": " + argument + " " + problem);
  }

  void at_least(const char* name, int64_t value, int64_t lowest) const {
    if (value < lowest) fail(name, "must be at least " + std::to_string(lowest) + ", got " + std::to_string(value));
  }

  void at_most(const char* name, int64_t value, const char* limit_name, int64_t limit) const {
    if (value > limit) {
      fail(name, "must be at most " + std::string(limit_name) + " (" + std::to_string(limit) + "), got " +
                     std::to_string(value));
    }
  }

  // The number of elements of a shape; every size must be non-negative and the product must fit into 62 bits.
  int64_t elements(std::initializer_list<NamedSize> sizes) const {
    for (const NamedSize& size : sizes) at_least(size.name, size.value, 0);
    int64_t product = 1;
    for (const NamedSize& size : sizes) {
      if (size.value == 0) return 0;
    }
    for (const NamedSize& size : sizes) {
      if (size.value > (INT64_MAX >> 1) / product) fail(size.name, "is too large: " + std::to_string(size.value));
      product *= size.value;
    }
    return product;
  }

  Dtype dtype(int number) const {
    if (number < 0 || number > static_cast<int>(Dtype::Float16)) {
      fail("dtype", "must be FLOAT32, BFLOAT16 or FLOAT16, got " + std::to_string(number));
    }
    return static_cast<Dtype>(number);
  }

  // The number of CPU threads; a CUDA stream may be any handle.
  void executor([[maybe_unused]] intptr_t value) const {
#ifndef MEGASHEAR_CUDA
    at_least("executor", value, 1);
#endif
  }

  // A tensor that may be null.
  template <typename T>
  T* optional(const char* name, Address address) const {
    return static_cast<T*>(checked(name, address, sizeof(T)));
  }

  // A tensor that must not be null if it has elements.
  template <typename T>
  T* required(const char* name, Address address, int64_t elements) const {
    require(name, address, elements);
    return optional<T>(name, address);
  }

  void* optional(const char* name, Address address, Dtype dtype) const {
    return checked(name, address, bytes_of(dtype));
  }

  void* required(const char* name, Address address, int64_t elements, Dtype dtype) const {
    require(name, address, elements);
    return optional(name, address, dtype);
  }

  void* optional(const char* name, const Matrix& matrix, Dtype dtype) const {
    at_least((std::string("the row stride of ") + name).c_str(), matrix[1], 0);
    return optional(name, static_cast<Address>(matrix[0]), dtype);
  }

  void* required(const char* name, const Matrix& matrix, int64_t elements, Dtype dtype) const {
    require(name, static_cast<Address>(matrix[0]), elements);
    return optional(name, matrix, dtype);
  }

  void* required(const char* name, const Strided& tensor, int64_t elements, Dtype dtype) const {
    for (int i = 1; i < 4; ++i) {
      at_least(("stride " + std::to_string(i - 1) + " of " + name).c_str(), tensor[static_cast<size_t>(i)], 0);
    }
    return required(name, static_cast<Address>(tensor[0]), elements, dtype);
  }

 private:
  static constexpr Address kFirstPage = 4096;  // never mapped, so an address below is no tensor's

  void require(const char* name, Address address, int64_t elements) const {
    if (address == 0 && elements > 0) {
      fail(name, "is null, but the sizes ask for " + std::to_string(elements) + " elements");
    }
  }

  void* checked(const char* name, Address address, int64_t alignment) const {
    if (address != 0 && (address < kFirstPage || address > static_cast<Address>(INT64_MAX))) {
      fail(name, "is not a valid address: " + std::to_string(address));
    }
    if (address % static_cast<Address>(alignment) != 0) {
      fail(name, "must be aligned to " + std::to_string(alignment) + " bytes, got address " + std::to_string(address));
    }
    return reinterpret_cast<void*>(address);
  }

  const char* op_;
};

}  // namespace megashear
