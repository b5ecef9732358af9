// cpu.cpp: masked attention on the CPU; threads share the heads forward and the query groups backward.
//
// Each head or group is computed by one thread in one order, so results repeat on any number of threads. See
// cpu_forward.h, cpu_backward.h (the passes), cpu_blocking.h, cpu_operands.h (operands), cpu_tiles.h (arithmetic of one block).
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_avx512.h"
#include "cpu_portable.h"

namespace megashear {
namespace {

// ---- choice of an instruction set -----------------------------------------------------------------------------------

std::vector<const Tiles*> tiles_for(Dtype dtype) {
  std::vector<const Tiles*> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(MEGASHEAR_COMPILES_AVX512_BF16)
  const bool bf16 = dtype == Dtype::BFloat16;
  if (wide && bf16 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::tiles);
#endif
  if (wide) found.push_back(&avx512::tiles);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::tiles);
#endif
  (void)dtype;
  found.push_back(&portable::tiles);
  return found;
}

const Tiles& choose(Dtype dtype, const char* name) {
  const std::vector<const Tiles*> usable = tiles_for(dtype);
  if (*name == '\0') return *usable.front();
  for (const Tiles* tiles : usable) {
    if (std::strcmp(tiles->name, name) == 0) return *tiles;
  }
  return portable::tiles;
}

// ---- loops over heads or groups -------------------------------------------------------------------------------------

// Calls run(b, i) of a `Part` for b < batch and i < parts, each on one thread with memory of its own.
template <typename Part, typename Pass>
void share(const Pass& pass, const Tiles& tiles, int64_t batch, int64_t parts, intptr_t executor) {
  const int64_t items = batch * parts;
  const int64_t words = rounded_up(Part(pass, tiles, nullptr).words_needed(), 16);
  const int threads = static_cast<int>(std::min<int64_t>(std::max<int64_t>(executor, 1), items));
  const std::unique_ptr<Word[]> memory(new Word[static_cast<size_t>(words * threads + 16)]);
  Word* aligned = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / sizeof(Word);
#pragma omp parallel num_threads(threads)
  {
    Part part(pass, tiles, aligned + words * omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) part.run(item / parts, item % parts);
  }
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

std::string masked_attention_tiles(Dtype dtype) {
  std::string names;
  for (const Tiles* tiles : tiles_for(dtype)) names += (names.empty() ? "" : " ") + std::string(tiles->name);
  return names;
}

bool masked_attention_takes(int64_t) { return true; }

int64_t masked_attention_scratch(const AttentionSizes& sizes) { return sizes.batch * sizes.heads; }

void masked_attention_forward(const AttentionForward& pass, const char* tiles, intptr_t executor) {
  const AttentionSizes& sizes = pass.sizes;
  if (sizes.batch * sizes.heads * sizes.tokens * sizes.head_dim == 0) return;
  share<ForwardHead>(pass, choose(pass.dtype, tiles), sizes.batch, sizes.heads, executor);
}

void masked_attention_backward(const AttentionBackward& pass, const char* tiles, intptr_t executor) {
  const AttentionSizes& sizes = pass.forward.sizes;
  if (sizes.batch * sizes.heads * sizes.tokens * sizes.head_dim != 0) {
    share<BackwardGroup>(pass, choose(pass.forward.dtype, tiles), sizes.batch, sizes.groups, executor);
  } else if (pass.scratch != nullptr) {
    std::fill_n(pass.scratch, sizes.batch * sizes.heads, 0.0f);
  }
  if (pass.dmask != nullptr) sum_strips(pass.scratch, pass.dmask, sizes.batch, sizes.heads, 1);
}

}  // namespace megashear
