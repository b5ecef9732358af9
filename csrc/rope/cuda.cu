// cuda.cu: RoPE and the split of the fused product on CUDA; a block walks over the heads of one token.
//
// A thread owns a pack of first halves and the pack of second halves that turns with it.
#include "../cuda_launch.cuh"
#include "rope.h"

namespace megashear {
namespace {

struct QkvRows {
  HeadRows fused, q, k, v;
};

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T* head_of(const HeadRows& rows, int64_t position, int64_t sequence, int64_t head) {
  return static_cast<T*>(rows.data) + position * rows.position + sequence * rows.sequence + head * rows.head;
}

template <bool Forward, typename T, int N>
__global__ void __launch_bounds__(kThreads)
    turn_kernel(QkvRows rows, const float* cos, const float* sin, RopeSizes sizes) {
  const uint32_t packs = static_cast<uint32_t>(sizes.half / N), queries = static_cast<uint32_t>(sizes.queries);
  const uint32_t items = static_cast<uint32_t>(sizes.groups) * (queries + 2) * packs;
  for (int64_t token = blockIdx.x; token < sizes.positions * sizes.batch; token += gridDim.x) {
    const int64_t s = token / sizes.batch, b = token % sizes.batch;
    for (uint32_t item = threadIdx.x; item < items; item += kThreads) {
      const uint32_t head = item / packs, i = (item % packs) * N;
      const uint32_t g = head / (queries + 2), h = head % (queries + 2);
      T* fused = head_of<T>(rows.fused, s, b, head) + i;
      T* apart = i + (h < queries    ? head_of<T>(rows.q, s, b, g * queries + h)
                      : h == queries ? head_of<T>(rows.k, s, b, g)
                                     : head_of<T>(rows.v, s, b, g));
      const T* from = Forward ? fused : apart;
      T* to = Forward ? apart : fused;
      Pack<T, N> first = load<T, N>(from), second = load<T, N>(from + sizes.half);
      if (h <= queries) {
        float cosine[N], sine[N];
        load_floats<N>(cosine, cos + s * sizes.half + i);
        load_floats<N>(sine, sin + s * sizes.half + i);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float x = widen(first.value[n]), y = widen(second.value[n]), turn = Forward ? sine[n] : -sine[n];
          first.value[n] = narrow<T>(rotated_first(x, y, cosine[n], turn));
          second.value[n] = narrow<T>(rotated_second(x, y, cosine[n], turn));
        }
      }
      store<T, N>(to, first);
      store<T, N>(to + sizes.half, second);
    }
  }
}

// ---- launchers of one type ------------------------------------------------------------------------------------------

template <typename T>
bool rows_fit(const HeadRows& rows) {
  return packs_fit<T>(rows.position | rows.sequence | rows.head, rows.data);
}

template <bool Forward, typename T>
void turn_any(const QkvRows& rows, const float* cos, const float* sin, const RopeSizes& sizes, cudaStream_t stream) {
  constexpr int wide = 16 / sizeof(T);
  const bool fits = rows_fit<T>(rows.fused) && rows_fit<T>(rows.q) && rows_fit<T>(rows.k) && rows_fit<T>(rows.v) &&
                    packs_fit<T>(sizes.half, cos, sin);
  const auto kernel = fits ? turn_kernel<Forward, T, wide> : turn_kernel<Forward, T, 1>;
  kernel<<<blocks_for(sizes.positions * sizes.batch, 1), kThreads, 0, stream>>>(rows, cos, sin, sizes);
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void rope_qkv_forward(HeadRows fused, const float* cos, const float* sin, HeadRows q, HeadRows k, HeadRows v,
                      RopeSizes sizes, Dtype dtype, intptr_t executor) {
  if (sizes.positions * sizes.batch == 0) return;
  by_dtype(dtype, [&](auto element) {
    turn_any<true, decltype(element)>({fused, q, k, v}, cos, sin, sizes, stream_of(executor));
  });
  check_launch("rope_qkv forward");
}

void rope_qkv_backward(HeadRows dq, HeadRows dk, HeadRows dv, const float* cos, const float* sin, HeadRows dfused,
                       RopeSizes sizes, Dtype dtype, intptr_t executor) {
  if (sizes.positions * sizes.batch == 0) return;
  by_dtype(dtype, [&](auto element) {
    turn_any<false, decltype(element)>({dfused, dq, dk, dv}, cos, sin, sizes, stream_of(executor));
  });
  check_launch("rope_qkv backward");
}

}  // namespace megashear
