// bindings.h: masked_swiglu.h as Python functions of addresses, strides of rows, and sizes.
#pragma once

#include "../address.h"
#include "masked_swiglu.h"

namespace megashear {

inline void bind_masked_swiglu(py::module_& module) {
  module.def(
      "masked_swiglu_forward",
      [](Matrix gate_up, Address mask, Address out, int64_t tokens, int64_t features, int dtype, intptr_t executor) {
        masked_swiglu_forward(at(gate_up), gate_up[1], at<float>(mask), at(out), tokens, features,
                              static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_swiglu_backward",
      [](Matrix dout, Matrix gate_up, Address mask, Address dgate_up, Address dmask, Address partial, int64_t tokens,
         int64_t features, int dtype, intptr_t executor) {
        masked_swiglu_backward(at(dout), dout[1], at(gate_up), gate_up[1], at<float>(mask), at(dgate_up),
                               at<float>(dmask), at<float>(partial), tokens, features, static_cast<Dtype>(dtype),
                               executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
