// bindings.h: Python bindings of masked_swiglu.h.
#pragma once

#include "../address.h"
#include "masked_swiglu.h"

namespace megashear {

inline void bind_masked_swiglu(py::module_& module) {
  module.def(
      "masked_swiglu_forward",
      [](Matrix gate_up, Address mask, Address out, int64_t tokens, int64_t features, int dtype, intptr_t executor) {
        const Arguments check("masked_swiglu_forward");
        const Dtype type = check.dtype(dtype);
        const int64_t count = check.elements({{"tokens", tokens}, {"features", features}});
        check.executor(executor);
        masked_swiglu_forward(check.required("gate_up", gate_up, count, type), gate_up[1],
                              check.optional<float>("mask", mask), check.required("out", out, count, type), tokens,
                              features, type, executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_swiglu_backward",
      [](Matrix dout, Matrix gate_up, Address mask, Address dgate_up, Address dmask, Address partial, int64_t tokens,
         int64_t features, int dtype, intptr_t executor) {
        const Arguments check("masked_swiglu_backward");
        const Dtype type = check.dtype(dtype);
        const int64_t count = check.elements({{"tokens", tokens}, {"features", features}});
        check.executor(executor);
        const int64_t masked = mask == 0 ? 0 : features, summed = tokens == 0 ? 0 : masked;
        masked_swiglu_backward(check.required("dout", dout, count, type), dout[1],
                               check.required("gate_up", gate_up, count, type), gate_up[1],
                               check.optional<float>("mask", mask), check.required("dgate_up", dgate_up, count, type),
                               check.required<float>("dmask", dmask, masked),
                               check.required<float>("partial", partial, summed), tokens, features, type, executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
