// cpu.cpp: RoPE and the split of the fused product on the CPU; threads share the tokens.
#include "../parallel_cpu.h"
#include "rope.h"

namespace megashear {
namespace {

// One token's rows: heads of q, k, v are `*_head` elements apart, those of the fused row 2 half.
template <typename T>
struct Token {
  T *fused, *q, *k, *v;
  int64_t q_head, k_head, v_head;
  const float *cos, *sin;
};

// ---- kernels of one token -------------------------------------------------------------------------------------------

template <bool Forward, typename T>
MEGASHEAR_ROW void turn(const T* __restrict from, T* __restrict to, const float* __restrict cos,
                        const float* __restrict sin, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = widen(from[i]), second = widen(from[half + i]);
    const float c = cos[i], s = Forward ? sin[i] : -sin[i];
    to[i] = narrow<T>(rotated_first(first, second, c, s));
    to[half + i] = narrow<T>(rotated_second(first, second, c, s));
  }
}

template <bool Forward, typename T>
MEGASHEAR_ROW void turn_heads(const Token<T>& token, const RopeSizes& sizes) {
  const int64_t half = sizes.half, width = 2 * half;
  T* fused = token.fused;
  for (int64_t g = 0; g < sizes.groups; ++g) {
    for (int64_t h = 0; h <= sizes.queries; ++h, fused += width) {
      T* apart = h < sizes.queries ? token.q + (g * sizes.queries + h) * token.q_head : token.k + g * token.k_head;
      turn<Forward>(Forward ? fused : apart, Forward ? apart : fused, token.cos, token.sin, half);
    }
    T* value = token.v + g * token.v_head;
    std::memcpy(Forward ? value : fused, Forward ? fused : value, static_cast<size_t>(width) * sizeof(T));
    fused += width;
  }
}

MEGASHEAR_MULTIVERSION void forward_token(const Token<float>& token, const RopeSizes& sizes) {
  turn_heads<true>(token, sizes);
}
MEGASHEAR_MULTIVERSION void forward_token(const Token<BFloat16>& token, const RopeSizes& sizes) {
  turn_heads<true>(token, sizes);
}
MEGASHEAR_MULTIVERSION void forward_token(const Token<Float16>& token, const RopeSizes& sizes) {
  turn_heads<true>(token, sizes);
}
MEGASHEAR_MULTIVERSION void backward_token(const Token<float>& token, const RopeSizes& sizes) {
  turn_heads<false>(token, sizes);
}
MEGASHEAR_MULTIVERSION void backward_token(const Token<BFloat16>& token, const RopeSizes& sizes) {
  turn_heads<false>(token, sizes);
}
MEGASHEAR_MULTIVERSION void backward_token(const Token<Float16>& token, const RopeSizes& sizes) {
  turn_heads<false>(token, sizes);
}

// ---- loop over tokens -----------------------------------------------------------------------------------------------

template <typename T>
T* row_of(const HeadRows& rows, int64_t position, int64_t sequence) {
  return static_cast<T*>(rows.data) + position * rows.position + sequence * rows.sequence;
}

template <bool Forward, typename T>
void turn_tokens(const HeadRows& fused, const HeadRows& q, const HeadRows& k, const HeadRows& v, const float* cos,
                 const float* sin, const RopeSizes& sizes, intptr_t executor) {
  const int64_t tokens = sizes.positions * sizes.batch;
  const int64_t elements = tokens * sizes.groups * (sizes.queries + 2) * 2 * sizes.half;
#pragma omp parallel for num_threads(parallel_threads(executor, elements)) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t s = t / sizes.batch, b = t % sizes.batch;
    const Token<T> token = {row_of<T>(fused, s, b), row_of<T>(q, s, b),    row_of<T>(k, s, b),   row_of<T>(v, s, b),
                            q.head,                 k.head,                v.head,               cos + s * sizes.half,
                            sin + s * sizes.half};
    if constexpr (Forward) {
      forward_token(token, sizes);
    } else {
      backward_token(token, sizes);
    }
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

void rope_qkv_forward(HeadRows fused, const float* cos, const float* sin, HeadRows q, HeadRows k, HeadRows v,
                      RopeSizes sizes, Dtype dtype, intptr_t executor) {
  by_dtype(dtype, [&](auto element) {
    turn_tokens<true, decltype(element)>(fused, q, k, v, cos, sin, sizes, executor);
  });
}

void rope_qkv_backward(HeadRows dq, HeadRows dk, HeadRows dv, const float* cos, const float* sin, HeadRows dfused,
                       RopeSizes sizes, Dtype dtype, intptr_t executor) {
  by_dtype(dtype, [&](auto element) {
    turn_tokens<false, decltype(element)>(dfused, dq, dk, dv, cos, sin, sizes, executor);
  });
}

}  // namespace megashear
