// bindings.cpp: the kernels as Python functions of integer addresses and sizes, so that building needs no torch.
//
// Compiled once per device: megashear._csrc with the CPU sources, megashear._csrc_cuda with the CUDA sources. Addresses
// are of contiguous memory on that device, 0 for null; `executor` is the number of threads, or the CUDA stream. Sizes
// and meanings stand in the header of each op. Nothing is checked here: megashear/ops/kernels does that.
#include <pybind11/pybind11.h>

#include "device.h"
#include "hard_concrete/hard_concrete.h"
#include "masked_rms_norm/masked_rms_norm.h"
#include "masked_swiglu/masked_swiglu.h"

#ifndef MEGASHEAR_MODULE
#define MEGASHEAR_MODULE _csrc
#endif

namespace py = pybind11;
using megashear::Dtype;
using megashear::NoiseKey;

namespace {

using Address = uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_hard_concrete(py::module_& module) {
  module.def(
      "hard_concrete_noise",
      [](uint64_t seed, uint32_t step, uint32_t micro_batch, uint32_t granularity, Address uniform, int64_t units,
         intptr_t executor) {
        megashear::hard_concrete_noise(NoiseKey{seed, step, micro_batch, granularity}, at<float>(uniform), units,
                                       executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "hard_concrete_sample",
      [](Address log_alpha, Address uniform, uint64_t seed, uint32_t step, uint32_t micro_batch, uint32_t granularity,
         Address z, Address slope, int64_t units, intptr_t executor) {
        megashear::hard_concrete_sample(at<float>(log_alpha), at<float>(uniform),
                                        NoiseKey{seed, step, micro_batch, granularity}, at<float>(z), at<float>(slope),
                                        units, executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_masked_swiglu(py::module_& module) {
  module.def(
      "masked_swiglu_forward",
      [](Address gate_up, Address mask, Address out, int64_t tokens, int64_t features, int dtype, intptr_t executor) {
        megashear::masked_swiglu_forward(at(gate_up), at<float>(mask), at(out), tokens, features,
                                         static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_swiglu_backward",
      [](Address dout, Address gate_up, Address mask, Address dgate_up, Address dmask, Address partial, int64_t tokens,
         int64_t features, int dtype, intptr_t executor) {
        megashear::masked_swiglu_backward(at(dout), at(gate_up), at<float>(mask), at(dgate_up), at<float>(dmask),
                                          at<float>(partial), tokens, features, static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_masked_rms_norm(py::module_& module) {
  module.def(
      "masked_rms_norm_forward",
      [](Address x, Address weight, Address mask, Address out, Address r, float eps, int64_t tokens, int64_t hidden,
         int dtype, intptr_t executor) {
        megashear::masked_rms_norm_forward(at(x), at<float>(weight), at<float>(mask), at(out), at<float>(r), eps,
                                           tokens, hidden, static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_rms_norm_backward",
      [](Address dout, Address x, Address weight, Address mask, Address r, Address dx, Address dweight, Address dmask,
         Address partial, int64_t tokens, int64_t hidden, int dtype, intptr_t executor) {
        megashear::masked_rms_norm_backward(at(dout), at(x), at<float>(weight), at<float>(mask), at<float>(r), at(dx),
                                            at<float>(dweight), at<float>(dmask), at<float>(partial), tokens, hidden,
                                            static_cast<Dtype>(dtype), executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(MEGASHEAR_MODULE, module) {
  module.doc() = "Compiled kernels of megashear, on raw addresses; megashear.ops is the door to them.";
  module.attr("FLOAT32") = static_cast<int>(Dtype::Float32);
  module.attr("BFLOAT16") = static_cast<int>(Dtype::BFloat16);
  module.def("device_problem", &megashear::device_problem, "Empty, or why the kernels cannot run on this device.");
  module.def("strip_count", &megashear::strip_count, "Rows of the scratch table of column sums, for so many tokens.");
  bind_hard_concrete(module);
  bind_masked_swiglu(module);
  bind_masked_rms_norm(module);
}
