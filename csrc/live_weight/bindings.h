// bindings.h: Python bindings of live_weight.h.
#pragma once

#include "../address.h"
#include "live_weight.h"

namespace megashear {

// Checks the sizes and returns the number of live elements.
inline int64_t live_count(const Arguments& check, int64_t row_count, int64_t column_count, int64_t stride,
                          intptr_t executor) {
  const int64_t count = check.elements({{"row_count", row_count}, {"column_count", column_count}});
  check.at_least("stride", stride, 0);
  check.at_most("column_count", column_count, "stride", stride);
  check.executor(executor);
  return count;
}

inline void bind_live_weight(py::module_& module) {
  module.def(
      "live_weight_gather",
      [](Address weight, Address rows, Address columns, Address live, int64_t row_count, int64_t column_count,
         int64_t stride, int bytes, intptr_t executor) {
        const Arguments check("live_weight_gather");
        if (bytes != 2 && bytes != 4) check.fail("bytes", "must be 2 or 4, got " + std::to_string(bytes));
        const Dtype width = bytes == 4 ? Dtype::Float32 : Dtype::BFloat16;
        const int64_t count = live_count(check, row_count, column_count, stride, executor);
        live_weight_gather(check.required("weight", weight, count, width), check.optional<int64_t>("rows", rows),
                           check.optional<int64_t>("columns", columns), check.required("live", live, count, width),
                           row_count, column_count, stride, bytes, executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "live_weight_add",
      [](Address dlive, Address rows, Address columns, Address total, int64_t row_count, int64_t column_count,
         int64_t stride, int dtype, intptr_t executor) {
        const Arguments check("live_weight_add");
        const Dtype type = check.dtype(dtype);
        const int64_t count = live_count(check, row_count, column_count, stride, executor);
        live_weight_add(check.required("dlive", dlive, count, type), check.optional<int64_t>("rows", rows),
                        check.optional<int64_t>("columns", columns), check.required<float>("total", total, count),
                        row_count, column_count, stride, type, executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
