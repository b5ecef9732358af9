// group_products.cu: products of a warpgroup by csrc's own tiles, right and with one mistake each, for the machine that
// should show them; and where its descriptors find an element.
#include "masked_attention/warpgroup_tiles.cuh"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace megashear {
namespace {

enum Mistake { kNone, kNotShown, kNotWaited, kNotFenced, kStride, kLeading, kNotAligned, kWarpsDiffer, kOverwritten };

// out [64, 64] = left [64, D] right [64, D]^T, then more [64, D] = out right, from tiles that plain stores have filled.
template <int D>
__global__ void products_kernel(const float* left, const float* right, float* out, float* more, int mistake) {
  using W = WarpgroupTiles<BFloat16, D>;
  extern __shared__ uint4 memory[];
  BFloat16* a = mistake == kNotAligned ? reinterpret_cast<BFloat16*>(memory + 4) : W::begin(memory);
  BFloat16* b = a + W::template elements<64>;
  for (int item = threadIdx.x; item < 64 * D / 8; item += 128) {
    Pack<BFloat16, 8> of_a, of_b;
    for (int i = 0; i < 8; ++i) of_a.value[i] = narrow<BFloat16>(left[8 * item + i]);
    for (int i = 0; i < 8; ++i) of_b.value[i] = narrow<BFloat16>(right[8 * item + i]);
    W::put(W::template at<64>(a, 8 * item / D, 8 * item % D), of_a);
    W::put(W::template at<64>(b, 8 * item / D, 8 * item % D), of_b);
  }
  if (mistake != kNotShown) W::show();
  __syncthreads();
  float sums[1][8][4], weighted[1][D / 8][4];
  if (mistake == kStride || mistake == kLeading || mistake == kNotFenced) {
    if (mistake != kNotFenced) begin_products();
    for (int k = 0; k < D; k += 16) {
      const int at = k / W::width * 64 * W::width + k % W::width, stride = 16 * W::width;
      const uint64_t rows = tile_descriptor<W::width>(a + at, 16, mistake == kStride ? stride / 2 : stride);
      multiply_shared<BFloat16>(sums[0], rows, tile_descriptor<W::width>(b + at, 16, stride), k > 0);
    }
  } else if (mistake != kWarpsDiffer || threadIdx.x < 96) {
    W::template multiply<64>(sums, W::rows_from(a, 0), b);
  }
  if (mistake == kOverwritten) a[threadIdx.x] = b[threadIdx.x];
  if (mistake != kNotWaited) W::finish(sums);
  clear(weighted);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + g;
  for (int n = 0; n < 8; ++n) {
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 64 + 8 * n + 2 * t + i % 2] = sums[0][n][i];
  }
  if (mistake == kLeading) {
    begin_products();
    for (int k = 0; k < 64; k += 16) {
      uint32_t weights[4];
      pack_weights<BFloat16>(weights, sums[0][k / 8], sums[0][k / 8 + 1]);
      const uint64_t rows = tile_descriptor<W::width>(b + k * W::width, 64 * W::width, 16 * W::width);
      multiply_registers<BFloat16>(weighted[0], weights, rows);
    }
  } else {
    W::add(weighted, sums, b);
  }
  W::finish(weighted);
  for (int n = 0; n < D / 8; ++n) {
    for (int i = 0; i < 4; ++i) more[(row + i / 2 * 8) * D + 8 * n + 2 * t + i % 2] = weighted[0][n][i];
  }
}

template <int D>
void launch(const float* left, const float* right, float* out, float* more, int mistake) {
  const int bytes = 1024 + 2 * 2 * 64 * D;
  cudaFuncSetAttribute(products_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  products_kernel<D><<<1, 128, bytes>>>(left, right, out, more, mistake);
}

}  // namespace
}  // namespace megashear

// The launch's problem, or an empty string.
EXPORTED const char* run_products(int width, const float* left, const float* right, float* out, float* more,
                                  int mistake) {
  using namespace megashear;
  if (width == 48) launch<48>(left, right, out, more, mistake);
  if (width == 96) launch<96>(left, right, out, more, mistake);
  if (width == 128) launch<128>(left, right, out, more, mistake);
  return cudaGetLastError() == cudaSuccess ? "" : cudaGetErrorString(cudaErrorLaunchFailure);
}

// The address of an element by a descriptor, relative to the shared memory's begin.
EXPORTED unsigned element_address(uint64_t descriptor, bool rows_multiplied, unsigned index, unsigned k) {
  const emulation::Descriptor at(descriptor);
  return rows_multiplied ? at.by_rows(index, k) : at.by_columns(index, k);
}
