// bindings.h: live_weight.h as Python functions of addresses and sizes.
#pragma once

#include "../address.h"
#include "live_weight.h"

namespace megashear {

inline void bind_live_weight(py::module_& module) {
  module.def(
      "live_weight_gather",
      [](Address weight, Address rows, Address columns, Address live, int64_t row_count, int64_t column_count,
         int64_t stride, int bytes, intptr_t executor) {
        live_weight_gather(at(weight), at<int64_t>(rows), at<int64_t>(columns), at(live), row_count, column_count,
                           stride, bytes, executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "live_weight_add",
      [](Address dlive, Address rows, Address columns, Address total, int64_t row_count, int64_t column_count,
         int64_t stride, int dtype, intptr_t executor) {
        live_weight_add(at(dlive), at<int64_t>(rows), at<int64_t>(columns), at<float>(total), row_count, column_count,
                        stride, static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
