// bindings.h: Python bindings of masked_attention.h. A tensor is (address, strides of batch, heads and tokens).
#pragma once

#include "../address.h"
#include "masked_attention.h"

namespace megashear {

using BoundSizes = std::array<int64_t, 5>;  // batch, heads, groups, tokens, head_dim

inline AttentionSizes attention_sizes(const BoundSizes& sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

// Checks the sizes of a call and its tensors.
class AttentionArguments {
 public:
  AttentionArguments(const char* op, const BoundSizes& bound, int dtype, intptr_t executor)
      : check(op), type(check.dtype(dtype)), sizes(attention_sizes(bound)) {
    queries = check.elements({{"batch", sizes.batch}, {"heads", sizes.heads}, {"tokens", sizes.tokens}});
    check.at_least("groups", sizes.groups, 0);
    check.at_least("head_dim", sizes.head_dim, 0);
    if (sizes.groups == 0 ? sizes.heads != 0 : sizes.heads % sizes.groups != 0) {
      check.fail("heads", "must be a multiple of groups, got " + std::to_string(sizes.heads) + " heads and " +
                              std::to_string(sizes.groups) + " groups");
    }
    elements = check.elements({{"batch * heads * tokens", queries}, {"head_dim", sizes.head_dim}});
    if (elements > 0 && !masked_attention_takes(sizes.head_dim)) {
      check.fail("head_dim", "is not supported: " + std::to_string(sizes.head_dim));
    }
#ifndef MEGASHEAR_CUDA
    if (type == Dtype::Float16) check.fail("dtype", "must be FLOAT32 or BFLOAT16 on the CPU");
#endif
    check.executor(executor);
  }

  AttentionTensor tensor(const char* name, const Strided& bound) const {
    return {check.required(name, bound, elements, type), bound[1], bound[2], bound[3]};
  }

  AttentionForward forward(const Strided& q, const Strided& k, const Strided& v, Address mask, Address first,
                           const Strided& out, Address lse) const {
    return {sizes,
            type,
            tensor("q", q),
            tensor("k", k),
            tensor("v", v),
            tensor("out", out),
            check.optional<float>("mask", mask),
            check.optional<int32_t>("first", first),
            check.required<float>("lse", lse, queries)};
  }

  Arguments check;
  Dtype type;
  AttentionSizes sizes;
  int64_t queries = 0, elements = 0;  // batch * heads * tokens; times head_dim
};

inline void bind_masked_attention(py::module_& module) {
  module.def("masked_attention_takes", &masked_attention_takes);
  module.def("masked_attention_scratch",
             [](const BoundSizes& sizes) { return masked_attention_scratch(attention_sizes(sizes)); });
  module.def("masked_attention_tiles", [](int dtype) {
    return masked_attention_tiles(Arguments("masked_attention_tiles").dtype(dtype));
  });
  module.def(
      "masked_attention_forward",
      [](Strided q, Strided k, Strided v, Address mask, Address first, Strided out, Address lse, BoundSizes sizes,
         int dtype, const std::string& tiles, intptr_t executor) {
        const AttentionArguments arguments("masked_attention_forward", sizes, dtype, executor);
        masked_attention_forward(arguments.forward(q, k, v, mask, first, out, lse), tiles.c_str(), executor);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "masked_attention_backward",
      [](Strided dout, Strided q, Strided k, Strided v, Address mask, Address first, Strided out, Address lse,
         Strided dq, Strided dk, Strided dv, Address dmask, Address scratch, BoundSizes sizes, int dtype,
         const std::string& tiles, intptr_t executor) {
        const AttentionArguments arguments("masked_attention_backward", sizes, dtype, executor);
        const Arguments& check = arguments.check;
        const int64_t scratch_size = masked_attention_scratch(arguments.sizes);
#ifdef MEGASHEAR_CUDA
        const bool needs_scratch = true;
#else
        const bool needs_scratch = mask != 0;
#endif
        const AttentionBackward pass = {arguments.forward(q, k, v, mask, first, out, lse),
                                        arguments.tensor("dout", dout),
                                        arguments.tensor("dq", dq),
                                        arguments.tensor("dk", dk),
                                        arguments.tensor("dv", dv),
                                        check.required<float>("dmask", dmask, mask == 0 ? 0 : arguments.sizes.heads),
                                        check.required<float>("scratch", scratch, needs_scratch ? scratch_size : 0)};
        masked_attention_backward(pass, tiles.c_str(), executor);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace megashear
