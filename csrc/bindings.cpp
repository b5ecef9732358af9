// bindings.cpp: the kernels as Python functions of integer addresses and sizes, so that building needs no torch.
//
// Compiled once per device: megashear._csrc with the CPU sources and, with MEGASHEAR_CUDA defined, megashear._csrc_cuda
// with the CUDA sources. Addresses are of memory on that device, 0 for null; `executor` is the number of threads, or
// the CUDA stream. Every op's folder binds itself in its bindings.h; sizes and meanings stand in its header. Nothing is
// checked here: megashear/ops/kernels does that.
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
  module.doc() = "Compiled kernels of megashear, on raw addresses; megashear.ops is the door to them.";
  module.attr("FLOAT32") = static_cast<int>(Dtype::Float32);
  module.attr("BFLOAT16") = static_cast<int>(Dtype::BFloat16);
  module.attr("FLOAT16") = static_cast<int>(Dtype::Float16);
  module.def("device_problem", &device_problem, "Empty, or why the kernels cannot run on this device.");
  module.def("strip_count", &strip_count, "Rows of the scratch table of column sums, for so many tokens.");
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
