// bindings.h: cross_entropy.h as Python functions of addresses and sizes.
#pragma once

#include "../address.h"
#include "cross_entropy.h"

namespace megashear {

inline void bind_cross_entropy(py::module_& module) {
  module.def(
      "cross_entropy_forward",
      [](Address logits, Address labels, Address log_sum, Address label_logit, int64_t tokens, int64_t width,
         int64_t columns, int64_t first, int dtype, intptr_t executor) {
        cross_entropy_forward(at(logits), at<int64_t>(labels), at<float>(log_sum), at<float>(label_logit), tokens,
                              width, columns, first, static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "cross_entropy_backward",
      [](Address logits, Address labels, Address log_sum, Address dlog_sum, Address dlabel_logit, int64_t tokens,
         int64_t width, int64_t columns, int64_t first, int dtype, intptr_t executor) {
        cross_entropy_backward(at(logits), at<int64_t>(labels), at<float>(log_sum), at<float>(dlog_sum),
                               at<float>(dlabel_logit), tokens, width, columns, first, static_cast<Dtype>(dtype),
                               executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
