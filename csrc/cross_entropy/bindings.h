// bindings.h: Python bindings of cross_entropy.h.
#pragma once

#include "../address.h"
#include "cross_entropy.h"

namespace megashear {

struct CrossEntropySizes {
  int64_t tokens, width, columns;
};

// Checks the sizes and returns the number of logits.
inline int64_t logit_count(const Arguments& check, const CrossEntropySizes& sizes, intptr_t executor) {
  const int64_t logits = check.elements({{"tokens", sizes.tokens}, {"width", sizes.width}});
  check.at_least("columns", sizes.columns, 0);
  check.at_most("columns", sizes.columns, "width", sizes.width);
  check.executor(executor);
  return logits;
}

inline void bind_cross_entropy(py::module_& module) {
  module.def(
      "cross_entropy_forward",
      [](Address logits, Address labels, Address log_sum, Address label_logit, int64_t tokens, int64_t width,
         int64_t columns, int64_t first, int dtype, intptr_t executor) {
        const Arguments check("cross_entropy_forward");
        const Dtype type = check.dtype(dtype);
        const int64_t count = logit_count(check, {tokens, width, columns}, executor);
        cross_entropy_forward(check.required("logits", logits, count, type),
                              check.required<int64_t>("labels", labels, tokens),
                              check.required<float>("log_sum", log_sum, tokens),
                              check.required<float>("label_logit", label_logit, tokens), tokens, width, columns, first,
                              type, executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "cross_entropy_backward",
      [](Address logits, Address labels, Address log_sum, Address dlog_sum, Address dlabel_logit, int64_t tokens,
         int64_t width, int64_t columns, int64_t first, int dtype, intptr_t executor) {
        const Arguments check("cross_entropy_backward");
        const Dtype type = check.dtype(dtype);
        const int64_t count = logit_count(check, {tokens, width, columns}, executor);
        cross_entropy_backward(check.required("logits", logits, count, type),
                               check.required<int64_t>("labels", labels, tokens),
                               check.required<float>("log_sum", log_sum, tokens),
                               check.required<float>("dlog_sum", dlog_sum, tokens),
                               check.required<float>("dlabel_logit", dlabel_logit, tokens), tokens, width, columns,
                               first, type, executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
