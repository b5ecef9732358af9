// cuda.cu: masked attention on CUDA: kernel selection and launches.
//
// Tensor cores are used for bf16 and fp16 up to a head size of 128: by warpgroups on sm_90 (Hopper) for heads above 32, by
// warps elsewhere. fp32 and wider heads use cuda_cores.cuh.
// tile.cuh, warp_tiles.cuh and warpgroup_tiles.cuh hold the tiles and their products.
#include <cmath>

#include "backward.cuh"
#include "delta.cuh"
#include "forward.cuh"
#include "cuda_cores.cuh"
#include "warpgroup_tiles.cuh"
#include "warp_tiles.cuh"

namespace megashear {
namespace {

constexpr int kWidest = 128;      // head size that tiles are made for
constexpr int kGroupsAbove = 32;  // head size that warpgroups take; they would compute many zeros for a smaller one

// ---- choices --------------------------------------------------------------------------------------------------------

enum class Way { Groups, Warps, Plain };

// Whether the code for the current device was compiled for sm_80 or later; else it has no products of tiles.
bool has_tensor_cores() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, forward_kernel<WarpTiles<BFloat16, 64>>);
  return status == cudaSuccess && attributes.ptxVersion >= 80;
}

// Whether it was compiled for sm_90a, and runs there. Other code traps in the place of these kernels, which takes few
// registers (4), while the scores of a tile alone are 64 a thread.
bool has_group_products() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, forward_kernel<WarpgroupTiles<BFloat16, 64>>);
  return status == cudaSuccess && attributes.binaryVersion == 90 && attributes.numRegs > 64;
}

// By the wish `tiles` where it can be had, else the best.
Way way_of(const AttentionForward& pass, const std::string& tiles) {
  const int64_t width = pass.sizes.head_dim;
  if (pass.dtype == Dtype::Float32 || width > kWidest || tiles == "plain" || !has_tensor_cores()) return Way::Plain;
  if (width <= kGroupsAbove || tiles == "tensor_cores" || !has_group_products()) return Way::Warps;
  return Way::Groups;
}

// Whether rows of all these tensors are whole packs of 16 bytes.
template <typename... Tensors>
bool rows_are_packs(int64_t head_dim, const Tensors&... tensors) {
  const int64_t strides = (head_dim | ... | (tensors.batch | tensors.head | tensors.token));
  return packs_fit<BFloat16>(strides, tensors.data...);  // fp16 has the same size
}

// Calls `launch` with the tiles that a head size takes.
template <typename T, typename Launch>
void with_tiles_of(Way way, int64_t head_dim, Launch launch) {
  if (way == Way::Warps) {
    if (head_dim <= 64) return launch(WarpTiles<T, 64>{});
    if (head_dim <= 96) return launch(WarpTiles<T, 96>{});
    return launch(WarpTiles<T, kWidest>{});
  }
  if (head_dim <= 48) return launch(WarpgroupTiles<T, 48>{});
  if (head_dim <= 64) return launch(WarpgroupTiles<T, 64>{});
  if (head_dim <= 80) return launch(WarpgroupTiles<T, 80>{});
  if (head_dim <= 96) return launch(WarpgroupTiles<T, 96>{});
  return launch(WarpgroupTiles<T, kWidest>{});
}

template <typename Launch>
void with_tiles(Way way, const AttentionForward& pass, Launch launch) {
  if (pass.dtype == Dtype::BFloat16) return with_tiles_of<BFloat16>(way, pass.sizes.head_dim, launch);
  return with_tiles_of<Float16>(way, pass.sizes.head_dim, launch);
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

template <typename W>
void forward_by_tiles(const AttentionForward& pass, cudaStream_t stream) {
  using Shape = ForwardShape<W>;
  const AttentionSizes& sizes = pass.sizes;
  const bool wide = rows_are_packs(sizes.head_dim, pass.q, pass.k, pass.v, pass.out);
  const unsigned grid = grid_of(sizes.batch * sizes.heads, sizes.tokens, Shape::queries);
  allow_shared(forward_kernel<W>, Shape::bytes);
  forward_kernel<W><<<grid, W::threads, Shape::bytes, stream>>>(pass, score_scale(sizes), wide);
}

template <typename W>
void backward_by_tiles(const AttentionBackward& pass, const float* delta, cudaStream_t stream) {
  using Queries = QueryShape<W>;
  using Keys = KeyShape<W>;
  const AttentionForward& forward = pass.forward;
  const AttentionSizes& sizes = forward.sizes;
  const float scale = score_scale(sizes);
  const bool wide =
      rows_are_packs(sizes.head_dim, forward.q, forward.k, forward.v, pass.dout, pass.dq, pass.dk, pass.dv);
  const unsigned queries = grid_of(sizes.batch * sizes.heads, sizes.tokens, Queries::own);
  const unsigned keys = grid_of(sizes.batch * sizes.groups, sizes.tokens, Keys::own);
  allow_shared(query_gradient_kernel<W>, Queries::bytes);
  query_gradient_kernel<W><<<queries, W::threads, Queries::bytes, stream>>>(pass, delta, scale, wide);
  allow_shared(key_gradient_kernel<W>, Keys::bytes);
  key_gradient_kernel<W><<<keys, W::threads, Keys::bytes, stream>>>(pass, delta, scale, wide);
}

void plain_forward(const AttentionForward& pass, cudaStream_t stream) {
  const AttentionSizes& sizes = pass.sizes;
  const int bytes = plain_bytes(sizes.head_dim);
  const unsigned grid = grid_of(sizes.batch * sizes.heads, sizes.tokens, kPlainRows);
  allow_shared(plain_forward_kernel, bytes);
  plain_forward_kernel<<<grid, kPlainThreads, bytes, stream>>>(pass, score_scale(sizes));
}

void plain_backward(const AttentionBackward& pass, const float* delta, cudaStream_t stream) {
  const AttentionSizes& sizes = pass.forward.sizes;
  const int bytes = plain_bytes(sizes.head_dim);
  const float scale = score_scale(sizes);
  const unsigned queries = grid_of(sizes.batch * sizes.heads, sizes.tokens, kPlainRows);
  const unsigned keys = grid_of(sizes.batch * sizes.groups, sizes.tokens, kPlainRows);
  allow_shared(plain_query_gradient_kernel, bytes);
  plain_query_gradient_kernel<<<queries, kPlainThreads, bytes, stream>>>(pass, delta, scale);
  allow_shared(plain_key_gradient_kernel, bytes);
  plain_key_gradient_kernel<<<keys, kPlainThreads, bytes, stream>>>(pass, delta, scale);
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
  if (dtype == Dtype::Float32 || !has_tensor_cores()) return "plain";
  return has_group_products() ? "wgmma tensor_cores plain" : "tensor_cores plain";
}

bool masked_attention_takes(int64_t head_dim) { return head_dim <= kPlainWidth; }

int64_t masked_attention_scratch(const AttentionSizes& sizes) {
  return sizes.batch * sizes.heads * (sizes.tokens + delta_blocks(sizes.tokens));
}

void masked_attention_forward(const AttentionForward& pass, const char* tiles, intptr_t executor) {
  if (is_empty(pass.sizes)) return;
  const cudaStream_t stream = stream_of(executor);
  const Way way = way_of(pass, tiles);
  if (way == Way::Plain) {
    plain_forward(pass, stream);
  } else {
    with_tiles(way, pass, [&](auto kind) { forward_by_tiles<decltype(kind)>(pass, stream); });
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
    const Way way = way_of(pass.forward, tiles);
    if (way == Way::Plain) {
      plain_backward(pass, delta, stream);
    } else {
      with_tiles(way, pass.forward, [&](auto kind) { backward_by_tiles<decltype(kind)>(pass, delta, stream); });
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
