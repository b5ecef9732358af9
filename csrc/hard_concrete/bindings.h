// bindings.h: Python bindings of hard_concrete.h.
#pragma once

#include "../address.h"
#include "hard_concrete.h"

namespace megashear {

inline void bind_hard_concrete(py::module_& module) {
  module.def(
      "hard_concrete_noise",
      [](uint64_t seed, uint32_t step, uint32_t micro_batch, uint32_t granularity, Address uniform, int64_t units,
         intptr_t executor) {
        const Arguments check("hard_concrete_noise");
        check.at_least("units", units, 0);
        check.executor(executor);
        hard_concrete_noise(NoiseKey{seed, step, micro_batch, granularity},
                            check.required<float>("uniform", uniform, units), units, executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "hard_concrete_sample",
      [](Address log_alpha, Address uniform, uint64_t seed, uint32_t step, uint32_t micro_batch, uint32_t granularity,
         Address z, Address slope, int64_t units, intptr_t executor) {
        const Arguments check("hard_concrete_sample");
        check.at_least("units", units, 0);
        check.executor(executor);
        hard_concrete_sample(check.required<float>("log_alpha", log_alpha, units),
                             check.optional<float>("uniform", uniform),
                             NoiseKey{seed, step, micro_batch, granularity}, check.required<float>("z", z, units),
                             check.required<float>("slope", slope, units), units, executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
