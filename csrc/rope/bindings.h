// bindings.h: Python bindings of rope.h. A tensor is (address, strides of positions, sequences and heads).
#pragma once

#include "../address.h"
#include "rope.h"

namespace megashear {

using Sizes = std::array<int64_t, 5>;  // positions, batch, groups, queries, half

// Checks the sizes of a call and its tensors.
class RopeArguments {
 public:
  RopeArguments(const char* op, const Sizes& sizes, int dtype, intptr_t executor)
      : check_(op), type(check_.dtype(dtype)), sizes{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]} {
    fused_ = check_.elements({{"positions", sizes[0]},
                              {"batch", sizes[1]},
                              {"groups", sizes[2]},
                              {"queries", sizes[3] < 0 ? sizes[3] : sizes[3] + 2},
                              {"half", sizes[4]}});
    check_.executor(executor);
  }

  HeadRows fused(const char* name, const Strided& tensor) const { return rows(name, tensor, fused_); }
  HeadRows queries(const char* name, const Strided& tensor) const {
    return rows(name, tensor, sizes.queries == 0 ? 0 : fused_);
  }
  HeadRows keys(const char* name, const Strided& tensor) const { return rows(name, tensor, fused_); }
  const float* table(const char* name, Address address) const {
    return check_.required<float>(name, address, fused_ == 0 ? 0 : sizes.positions * sizes.half);
  }

 private:
  HeadRows rows(const char* name, const Strided& tensor, int64_t elements) const {
    return {check_.required(name, tensor, elements, type), tensor[1], tensor[2], tensor[3]};
  }

  Arguments check_;
  int64_t fused_ = 0;

 public:
  Dtype type;
  RopeSizes sizes;
};

inline void bind_rope(py::module_& module) {
  module.def(
      "rope_qkv_forward",
      [](Strided fused, Address cos, Address sin, Strided q, Strided k, Strided v, Sizes sizes, int dtype,
         intptr_t executor) {
        const RopeArguments check("rope_qkv_forward", sizes, dtype, executor);
        rope_qkv_forward(check.fused("fused", fused), check.table("cos", cos), check.table("sin", sin),
                         check.queries("q", q), check.keys("k", k), check.keys("v", v), check.sizes, check.type,
                         executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "rope_qkv_backward",
      [](Strided dq, Strided dk, Strided dv, Address cos, Address sin, Strided dfused, Sizes sizes, int dtype,
         intptr_t executor) {
        const RopeArguments check("rope_qkv_backward", sizes, dtype, executor);
        rope_qkv_backward(check.queries("dq", dq), check.keys("dk", dk), check.keys("dv", dv), check.table("cos", cos),
                          check.table("sin", sin), check.fused("dfused", dfused), check.sizes, check.type, executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
