// bindings.h: masked_rms_norm.h as Python functions of addresses and sizes.
#pragma once

#include "../address.h"
#include "masked_rms_norm.h"

namespace megashear {

inline void bind_masked_rms_norm(py::module_& module) {
  module.def(
      "masked_rms_norm_forward",
      [](Address x, Address weight, Address mask, Address out, Address r, float eps, int64_t tokens, int64_t hidden,
         int dtype, intptr_t executor) {
        masked_rms_norm_forward(at(x), at<float>(weight), at<float>(mask), at(out), at<float>(r), eps, tokens, hidden,
                                static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_rms_norm_backward",
      [](Address dout, Address x, Address weight, Address mask, Address r, Address dx, Address dweight, Address dmask,
         Address partial, int64_t tokens, int64_t hidden, int dtype, intptr_t executor) {
        masked_rms_norm_backward(at(dout), at(x), at<float>(weight), at<float>(mask), at<float>(r), at(dx),
                                 at<float>(dweight), at<float>(dmask), at<float>(partial), tokens, hidden,
                                 static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
