// bindings.h: masked_rms_norm.h as Python functions of addresses, strides of rows, and sizes.
#pragma once

#include "../address.h"
#include "masked_rms_norm.h"

namespace megashear {

inline void bind_masked_rms_norm(py::module_& module) {
  module.def(
      "masked_rms_norm_forward",
      [](Matrix x, Matrix branch, Address branch_mask, Address weight, Address mask, Address sum, Address out,
         Address r, float eps, int64_t tokens, int64_t hidden, int dtype, intptr_t executor) {
        const NormForward norm = {at(x),
                                  at(branch),
                                  x[1],
                                  branch[1],
                                  at<float>(branch_mask),
                                  at<float>(weight),
                                  at<float>(mask),
                                  at(sum),
                                  at(out),
                                  at<float>(r),
                                  eps};
        masked_rms_norm_forward(norm, tokens, hidden, static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_rms_norm_backward",
      [](Matrix dout, Matrix dsum, Matrix x, Matrix branch, Address branch_mask, Address weight, Address mask,
         Address r, Address dx, Address dbranch, Address dweight, Address dmask, Address dbranch_mask, Address partial,
         int64_t tokens, int64_t hidden, int dtype, intptr_t executor) {
        const NormBackward norm = {at(dout),
                                   at(dsum),
                                   at(x),
                                   at(branch),
                                   dout[1],
                                   dsum[1],
                                   x[1],
                                   branch[1],
                                   at<float>(branch_mask),
                                   at<float>(weight),
                                   at<float>(mask),
                                   at<float>(r),
                                   at(dx),
                                   at(dbranch),
                                   at<float>(dweight),
                                   at<float>(dmask),
                                   at<float>(dbranch_mask),
                                   at<float>(partial)};
        masked_rms_norm_backward(norm, tokens, hidden, static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
