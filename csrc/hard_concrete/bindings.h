// bindings.h: hard_concrete.h as Python functions of addresses and sizes.
#pragma once

#include "../address.h"
#include "hard_concrete.h"

namespace megashear {

inline void bind_hard_concrete(py::module_& module) {
  module.def(
      "hard_concrete_noise",
      [](uint64_t seed, uint32_t step, uint32_t micro_batch, uint32_t granularity, Address uniform, int64_t units,
         intptr_t executor) {
        hard_concrete_noise(NoiseKey{seed, step, micro_batch, granularity}, at<float>(uniform), units, executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "hard_concrete_sample",
      [](Address log_alpha, Address uniform, uint64_t seed, uint32_t step, uint32_t micro_batch, uint32_t granularity,
         Address z, Address slope, int64_t units, intptr_t executor) {
        hard_concrete_sample(at<float>(log_alpha), at<float>(uniform), NoiseKey{seed, step, micro_batch, granularity},
                             at<float>(z), at<float>(slope), units, executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
