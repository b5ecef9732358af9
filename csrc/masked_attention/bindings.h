// bindings.h: masked_attention.h as Python functions of addresses, strides and sizes.
#pragma once

#include <pybind11/stl.h>

#include <array>

#include "../address.h"
#include "masked_attention.h"

namespace megashear {

// A tensor comes as (address, stride of batch, of head, of token).
using BoundTensor = std::array<int64_t, 4>;

inline AttentionTensor attention_tensor(const BoundTensor& bound) {
  return {at(static_cast<Address>(bound[0])), bound[1], bound[2], bound[3]};
}

inline AttentionSizes attention_sizes(const std::array<int64_t, 5>& sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

inline void bind_masked_attention(py::module_& module) {
  module.def("masked_attention_takes", &masked_attention_takes);
  module.def("masked_attention_scratch",
             [](std::array<int64_t, 5> sizes) { return masked_attention_scratch(attention_sizes(sizes)); });
  module.def("masked_attention_tiles",
             [](int dtype) { return masked_attention_tiles(static_cast<Dtype>(dtype)); });
  module.def(
      "masked_attention_forward",
      [](BoundTensor q, BoundTensor k, BoundTensor v, Address mask, Address first, BoundTensor out, Address lse,
         std::array<int64_t, 5> sizes, int dtype, const std::string& tiles, intptr_t executor) {
        const AttentionForward pass = {attention_sizes(sizes),
                                       static_cast<Dtype>(dtype),
                                       attention_tensor(q),
                                       attention_tensor(k),
                                       attention_tensor(v),
                                       attention_tensor(out),
                                       at<float>(mask),
                                       at<int32_t>(first),
                                       at<float>(lse)};
        masked_attention_forward(pass, tiles.c_str(), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_attention_backward",
      [](BoundTensor dout, BoundTensor q, BoundTensor k, BoundTensor v, Address mask, Address first, BoundTensor out,
         Address lse, BoundTensor dq, BoundTensor dk, BoundTensor dv, Address dmask, Address scratch,
         std::array<int64_t, 5> sizes, int dtype, const std::string& tiles, intptr_t executor) {
        const AttentionForward forward = {attention_sizes(sizes),
                                          static_cast<Dtype>(dtype),
                                          attention_tensor(q),
                                          attention_tensor(k),
                                          attention_tensor(v),
                                          attention_tensor(out),
                                          at<float>(mask),
                                          at<int32_t>(first),
                                          at<float>(lse)};
        const AttentionBackward pass = {forward,
                                        attention_tensor(dout),
                                        attention_tensor(dq),
                                        attention_tensor(dk),
                                        attention_tensor(dv),
                                        at<float>(dmask),
                                        at<float>(scratch)};
        masked_attention_backward(pass, tiles.c_str(), executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
