// bindings.h: Python bindings of masked_rms_norm.h.
#pragma once

#include "../address.h"
#include "masked_rms_norm.h"

namespace megashear {

inline void bind_masked_rms_norm(py::module_& module) {
  module.def(
      "masked_rms_norm_forward",
      [](Matrix x, Matrix branch, Address branch_mask, Address weight, Address mask, Address sum, Address out,
         Address r, float eps, int64_t tokens, int64_t hidden, int dtype, intptr_t executor) {
        const Arguments check("masked_rms_norm_forward");
        const Dtype type = check.dtype(dtype);
        const int64_t count = check.elements({{"tokens", tokens}, {"hidden", hidden}});
        check.executor(executor);
        const NormForward norm = {check.required("x", x, count, type),
                                  check.optional("branch", branch, type),
                                  x[1],
                                  branch[1],
                                  check.optional<float>("branch_mask", branch_mask),
                                  check.required<float>("weight", weight, hidden),
                                  check.optional<float>("mask", mask),
                                  check.required("sum", sum, branch[0] == 0 ? 0 : count, type),
                                  check.required("out", out, count, type),
                                  check.required<float>("r", r, tokens),
                                  eps};
        masked_rms_norm_forward(norm, tokens, hidden, type, executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_rms_norm_backward",
      [](Matrix dout, Matrix dsum, Matrix x, Matrix branch, Address branch_mask, Address weight, Address mask,
         Address r, Address dx, Address dbranch, Address dweight, Address dmask, Address dbranch_mask, Address partial,
         int64_t tokens, int64_t hidden, int dtype, intptr_t executor) {
        const Arguments check("masked_rms_norm_backward");
        const Dtype type = check.dtype(dtype);
        const int64_t count = check.elements({{"tokens", tokens}, {"hidden", hidden}});
        check.executor(executor);
        const int64_t branch_count = branch_mask == 0 ? 0 : count;
        const NormBackward norm = {
            check.required("dout", dout, count, type),
            check.optional("dsum", dsum, type),
            check.required("x", x, count, type),
            check.required("branch", branch, branch_count, type),
            dout[1],
            dsum[1],
            x[1],
            branch[1],
            check.optional<float>("branch_mask", branch_mask),
            check.required<float>("weight", weight, hidden),
            check.optional<float>("mask", mask),
            check.required<float>("r", r, tokens),
            check.required("dx", dx, count, type),
            check.required("dbranch", dbranch, branch_count, type),
            check.required<float>("dweight", dweight, hidden),
            check.required<float>("dmask", dmask, mask == 0 ? 0 : hidden),
            check.required<float>("dbranch_mask", dbranch_mask, branch_mask == 0 ? 0 : hidden),
            check.required<float>("partial", partial, tokens == 0 ? 0 : hidden)};
        masked_rms_norm_backward(norm, tokens, hidden, type, executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
