// bindings.h: rope.h as Python functions; a tensor is (address, strides of positions, sequences and heads).
#pragma once

#include "../address.h"
#include "rope.h"

namespace megashear {

using Rows = std::array<int64_t, 4>;  // address, stride of positions, of sequences, of heads
using Sizes = std::array<int64_t, 5>;  // positions, batch, groups, queries, half

inline HeadRows head_rows(const Rows& rows) {
  return {at(static_cast<Address>(rows[0])), rows[1], rows[2], rows[3]};
}

inline RopeSizes rope_sizes(const Sizes& sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]}; }

inline void bind_rope(py::module_& module) {
  module.def(
      "rope_qkv_forward",
      [](Rows fused, Address cos, Address sin, Rows q, Rows k, Rows v, Sizes sizes, int dtype, intptr_t executor) {
        rope_qkv_forward(head_rows(fused), at<float>(cos), at<float>(sin), head_rows(q), head_rows(k), head_rows(v),
                         rope_sizes(sizes), static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "rope_qkv_backward",
      [](Rows dq, Rows dk, Rows dv, Address cos, Address sin, Rows dfused, Sizes sizes, int dtype, intptr_t executor) {
        rope_qkv_backward(head_rows(dq), head_rows(dk), head_rows(dv), at<float>(cos), at<float>(sin),
                          head_rows(dfused), rope_sizes(sizes), static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
