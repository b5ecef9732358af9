// bindings.cpp: the kernels as Python functions of integer addresses and sizes, so that building needs no torch.
//
// Compiled once per device: megashear._csrc with the CPU sources and, with MEGASHEAR_CUDA defined, megashear._csrc_cuda
// with the CUDA sources. Addresses are of memory on that device, 0 for null; `executor` is the number of threads, or
// the CUDA stream. Each op's bindings.h checks addresses and sizes (address.h); shapes are documented in the op's header.
#include <pybind11/pybind11.h>

#include "cross_entropy/bindings.h"
#include "device.h"
#include "hard_concrete/bindings.h"
#include "live_weight/bindings.h"
#include "masked_attention/bindings.h"
#include "masked_rms_norm/bindings.h"
#include "masked_swiglu/bindings.h"
#include "number.h"
#include "rope/bindings.h"

#ifdef MEGASHEAR_CUDA
#define MEGASHEAR_MODULE _csrc_cuda
#else
#define MEGASHEAR_MODULE _csrc
#include "tokenize/bindings.h"  // no CUDA source
#endif

PYBIND11_MODULE(MEGASHEAR_MODULE, module) {
  using namespace megashear;
  module.doc() = "Compiled kernels of megashear, on raw addresses. Call them through megashear.ops.";
  module.attr("FLOAT32") = static_cast<int>(Dtype::Float32);
  module.attr("BFLOAT16") = static_cast<int>(Dtype::BFloat16);
  module.attr("FLOAT16") = static_cast<int>(Dtype::Float16);
  module.def("device_problem", &device_problem, "Why the kernels cannot run on this device; empty if they can.");
  module.def("strip_count", &strip_count, "Rows of the scratch table of column sums for a number of tokens.");
  bind_cross_entropy(module);
  bind_hard_concrete(module);
  bind_live_weight(module);
  bind_masked_swiglu(module);
  bind_masked_rms_norm(module);
  bind_rope(module);
  bind_masked_attention(module);
#ifndef MEGASHEAR_CUDA
  bind_tokenize(module);
#endif
}
