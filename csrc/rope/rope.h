// rope.h: the rotation of queries and keys by their positions, fused with the split of the product that made them.
//
// fused[s, b, g, r, :]: the product's row of position s and sequence b; for each group g its query heads, then its key,
// then its value, each `2 half` wide. q, k, v: [positions, batch, heads, 2 half], heads of k and v being the groups.
//   first' = first cos[s, i] - second sin[s, i]       first, second: elements i and half + i of a query or key
//   second' = second cos[s, i] + first sin[s, i]      (rotate-half, as Hugging Face's LLaMA); values are copied
// The gradient is the same with -sin, from q, k, v back into one matrix. Each element is read once and written once.
#pragma once

#include "../number.h"

namespace megashear {

MEGASHEAR_INLINE float rotated_first(float first, float second, float cos, float sin) {
  return first * cos - second * sin;
}

MEGASHEAR_INLINE float rotated_second(float first, float second, float cos, float sin) {
  return second * cos + first * sin;
}

struct RopeSizes {
  int64_t positions, batch, groups, queries, half;
};

// A tensor [positions, batch, heads, 2 half] whose last dimension is contiguous; strides in elements.
struct HeadRows {
  void* data;
  int64_t position, sequence, head;
};

// Launchers, defined by cpu.cpp and cuda.cu. `executor` is the number of threads or the CUDA stream.
// cos, sin: fp32 [at least positions, half]. fused has (queries + 2) groups heads, q queries * groups, k and v groups.
void rope_qkv_forward(HeadRows fused, const float* cos, const float* sin, HeadRows q, HeadRows k, HeadRows v,
                      RopeSizes sizes, Dtype dtype, intptr_t executor);
void rope_qkv_backward(HeadRows dq, HeadRows dk, HeadRows dv, const float* cos, const float* sin, HeadRows dfused,
                       RopeSizes sizes, Dtype dtype, intptr_t executor);

}  // namespace megashear
