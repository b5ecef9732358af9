// masked_swiglu.h: out[t, f] = silu(gate[t, f]) * up[t, f] * mask[f]        t: token, f: intermediate unit
//
// gate and up are the halves of one [tokens, 2 features] matrix, and so are their gradients:
//   dgate[t, f] = dout * mask * up * sig (1 + gate (1 - sig))      dup[t, f] = dout * mask * silu(gate)
//   dmask[f]    = sum over t of dout * silu(gate) * up             summed by strips of tokens, in a fixed order
// Each input is read once and each output written once. A null mask means ones, without a dmask.
#pragma once

#include "../number.h"

namespace megashear {

struct SwigluGradient {
  float gate, up, mask;
};

MEGASHEAR_INLINE float masked_swiglu(float gate, float up, float mask) { return gate * sigmoid(gate) * up * mask; }

MEGASHEAR_INLINE SwigluGradient masked_swiglu_gradient(float dout, float gate, float up, float mask) {
  const float sig = sigmoid(gate);
  const float silu = gate * sig;
  const float dproduct = dout * mask;
  return {dproduct * up * (sig * (1.0f + gate * (1.0f - sig))), dproduct * silu, dout * silu * up};
}

// Launchers, defined by cpu.cpp and cuda.cu. `executor` is the number of threads or the CUDA stream.
// gate_up, dgate_up: [tokens, 2 features]; out, dout: [tokens, features], all of `dtype`; those that are read have
// contiguous rows `*_row` elements apart. mask, dmask: fp32 [features]; partial: fp32 [strip_count(tokens), features],
// scratch. mask, dmask and partial are null together.
void masked_swiglu_forward(const void* gate_up, int64_t gate_up_row, const float* mask, void* out, int64_t tokens,
                           int64_t features, Dtype dtype, intptr_t executor);
void masked_swiglu_backward(const void* dout, int64_t dout_row, const void* gate_up, int64_t gate_up_row,
                            const float* mask, void* dgate_up, float* dmask, float* partial, int64_t tokens,
                            int64_t features, Dtype dtype, intptr_t executor);

}  // namespace megashear
