// cuda.cu: masked attention on CUDA: which kernels serve a pass, and their launches.
//
// Tensor cores serve bf16 and fp16 up to a head size of 128; fp32 and wider heads take kernels without them. Read next:
// tile.cuh (products of tiles), forward.cuh, backward.cuh, delta.cuh, plain.cuh.
#include <cmath>

#include "backward.cuh"
#include "delta.cuh"
#include "forward.cuh"
#include "plain.cuh"

namespace megashear {
namespace {

constexpr int kWidest = 128;  // head size that tiles are made for

// ---- choices --------------------------------------------------------------------------------------------------------

// Whether the code for the current device was compiled for sm_80 or later; else it has no products of tiles.
bool has_tensor_cores() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, forward_kernel<BFloat16, 64>);
  return status == cudaSuccess && attributes.ptxVersion >= 80;
}

bool takes_tensor_cores(const AttentionForward& pass, const std::string& tiles) {
  return pass.dtype != Dtype::Float32 && pass.sizes.head_dim <= kWidest && tiles != "plain" && has_tensor_cores();
}

// Whether rows of all these tensors are whole packs of 16 bytes.
template <typename... Tensors>
bool rows_are_packs(int64_t head_dim, const Tensors&... tensors) {
  const int64_t strides = (head_dim | ... | (tensors.batch | tensors.head | tensors.token));
  return packs_fit<BFloat16>(strides, tensors.data...);  // fp16 has the same size
}

// Calls `launch` with the element type, and the head size that tiles have.
template <typename Launch>
void by_tile(const AttentionForward& pass, Launch launch) {
  const auto by_width = [&](auto element) {
    if (pass.sizes.head_dim <= 64) return launch(element, std::integral_constant<int, 64>{});
    if (pass.sizes.head_dim <= 96) return launch(element, std::integral_constant<int, 96>{});
    return launch(element, std::integral_constant<int, kWidest>{});
  };
  if (pass.dtype == Dtype::BFloat16) return by_width(BFloat16{});
  return by_width(Float16{});
}

template <typename Kernel>
void allow_shared(Kernel kernel, int bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

unsigned grid_of(int64_t heads, int64_t tokens, int64_t rows) {
  return static_cast<unsigned>(heads * ((tokens + rows - 1) / rows));
}

float score_scale(const AttentionSizes& sizes) { return 1.0f / std::sqrt(static_cast<float>(sizes.head_dim)); }

bool is_empty(const AttentionSizes& sizes) { return sizes.batch * sizes.heads * sizes.tokens * sizes.head_dim == 0; }

// ---- launchers of one way -------------------------------------------------------------------------------------------

template <typename T, int D>
void forward_by_tiles(const AttentionForward& pass, cudaStream_t stream) {
  const AttentionSizes& sizes = pass.sizes;
  const bool wide = rows_are_packs(sizes.head_dim, pass.q, pass.k, pass.v, pass.out);
  const unsigned grid = grid_of(sizes.batch * sizes.heads, sizes.tokens, ForwardShape<D>::queries);
  allow_shared(forward_kernel<T, D>, ForwardShape<D>::bytes);
  forward_kernel<T, D><<<grid, kTileThreads, ForwardShape<D>::bytes, stream>>>(pass, score_scale(sizes), wide);
}

template <typename T, int D>
void backward_by_tiles(const AttentionBackward& pass, const float* delta, cudaStream_t stream) {
  using Queries = QueryShape<D>;
  using Keys = KeyShape<D>;
  const AttentionForward& forward = pass.forward;
  const AttentionSizes& sizes = forward.sizes;
  const float scale = score_scale(sizes);
  const bool wide =
      rows_are_packs(sizes.head_dim, forward.q, forward.k, forward.v, pass.dout, pass.dq, pass.dk, pass.dv);
  const unsigned queries = grid_of(sizes.batch * sizes.heads, sizes.tokens, Queries::own);
  const unsigned keys = grid_of(sizes.batch * sizes.groups, sizes.tokens, Keys::own);
  allow_shared(query_gradient_kernel<T, D>, Queries::bytes);
  query_gradient_kernel<T, D><<<queries, kTileThreads, Queries::bytes, stream>>>(pass, delta, scale, wide);
  allow_shared(key_gradient_kernel<T, D>, Keys::bytes);
  key_gradient_kernel<T, D><<<keys, kTileThreads, Keys::bytes, stream>>>(pass, delta, scale, wide);
}

void plain_forward(const AttentionForward& pass, cudaStream_t stream) {
  const AttentionSizes& sizes = pass.sizes;
  const int bytes = plain_bytes(sizes.head_dim);
  const unsigned grid = grid_of(sizes.batch * sizes.heads, sizes.tokens, kPlainRows);
  allow_shared(plain_forward_kernel, bytes);
  plain_forward_kernel<<<grid, kTileThreads, bytes, stream>>>(pass, score_scale(sizes));
}

void plain_backward(const AttentionBackward& pass, const float* delta, cudaStream_t stream) {
  const AttentionSizes& sizes = pass.forward.sizes;
  const int bytes = plain_bytes(sizes.head_dim);
  const float scale = score_scale(sizes);
  const unsigned queries = grid_of(sizes.batch * sizes.heads, sizes.tokens, kPlainRows);
  const unsigned keys = grid_of(sizes.batch * sizes.groups, sizes.tokens, kPlainRows);
  allow_shared(plain_query_gradient_kernel, bytes);
  plain_query_gradient_kernel<<<queries, kTileThreads, bytes, stream>>>(pass, delta, scale);
  allow_shared(plain_key_gradient_kernel, bytes);
  plain_key_gradient_kernel<<<keys, kTileThreads, bytes, stream>>>(pass, delta, scale);
}

template <typename T>
void launch_delta(const AttentionBackward& pass, float* delta, float* table, cudaStream_t stream) {
  const AttentionSizes& sizes = pass.forward.sizes;
  const AttentionTensor &dout = pass.dout, &out = pass.forward.out;
  const int64_t strides = dout.batch | dout.head | dout.token | out.batch | out.head | out.token | sizes.head_dim;
  const unsigned grid = grid_of(sizes.batch * sizes.heads, sizes.tokens, kDeltaTokens);
  const auto kernel = packs_fit<T>(strides, dout.data, out.data) ? delta_kernel<T, 16 / sizeof(T)> : delta_kernel<T, 1>;
  kernel<<<grid, kThreads, 0, stream>>>(pass, delta, table);
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

std::string masked_attention_tiles(Dtype dtype) {
  return dtype == Dtype::Float32 || !has_tensor_cores() ? "plain" : "tensor_cores plain";
}

bool masked_attention_takes(int64_t head_dim) { return head_dim <= kPlainWidth; }

int64_t masked_attention_scratch(const AttentionSizes& sizes) {
  return sizes.batch * sizes.heads * (sizes.tokens + delta_blocks(sizes.tokens));
}

void masked_attention_forward(const AttentionForward& pass, const char* tiles, intptr_t executor) {
  if (is_empty(pass.sizes)) return;
  const cudaStream_t stream = stream_of(executor);
  if (takes_tensor_cores(pass, tiles)) {
    by_tile(pass, [&](auto element, auto width) {
      forward_by_tiles<decltype(element), decltype(width)::value>(pass, stream);
    });
  } else {
    plain_forward(pass, stream);
  }
  check_launch("masked_attention forward");
}

void masked_attention_backward(const AttentionBackward& pass, const char* tiles, intptr_t executor) {
  const AttentionSizes& sizes = pass.forward.sizes;
  const cudaStream_t stream = stream_of(executor);
  float* delta = pass.scratch;
  float* table = delta + sizes.batch * sizes.heads * sizes.tokens;
  const bool empty = is_empty(sizes);
  if (!empty) {
    by_dtype(pass.forward.dtype, [&](auto element) { launch_delta<decltype(element)>(pass, delta, table, stream); });
    if (takes_tensor_cores(pass.forward, tiles)) {
      by_tile(pass.forward, [&](auto element, auto width) {
        backward_by_tiles<decltype(element), decltype(width)::value>(pass, delta, stream);
      });
    } else {
      plain_backward(pass, delta, stream);
    }
  }
  if (pass.dmask != nullptr && sizes.heads > 0) {
    const int64_t rows = empty ? 0 : sizes.batch * delta_blocks(sizes.tokens);
    mask_gradient_kernel<<<blocks_for(sizes.heads, kColumns), kThreads, 0, stream>>>(table, pass.forward.mask,
                                                                                     pass.dmask, rows, sizes.heads);
  }
  check_launch("masked_attention backward");
}

}  // namespace megashear
