// mma_warpgroup.cuh: emulation of csrc/mma_warpgroup.cuh, as documented in the PTX ISA.
//
// Sections "Register Fragments and Shared Memory Matrix Layouts" and "Matrix Descriptor" of "Asynchronous Warpgroup
// Level Matrix Instructions". A product is computed as late as it may be: when it is waited for, from what shared
// memory holds then. What a wrong kernel would get away with is made to show:
//   - sums are NaN from the first product to the wait
//   - the launch stops at products that read 16 bytes whose writer has not fenced them, that follow a wait without a
//     fence of registers, or that differ among the warps of a group; and at descriptors beyond shared memory, or of
//     tiles that begin inside of the pattern of crossed bits
// The block's shared memory begins at an address that is a multiple of 16 and of nothing more.
#pragma once

#include <cuda_runtime.h>

#include "mma_warp.cuh"

namespace emulation {

struct Product {
  float* sums;  // [columns / 8, 4] of this thread
  int columns;
  uint64_t a, b;
  bool from_registers, add;
  float left[2][16];  // rows g and g + 8, where they come from registers
  float (*widen)(uint16_t);

  bool same_instruction(const Product& other) const {
    return columns == other.columns && a == other.a && b == other.b && from_registers == other.from_registers &&
           add == other.add;
  }
};

// The address of an element of 2 bytes by a descriptor.
class Descriptor {
 public:
  explicit Descriptor(uint64_t bits)
      : start_((bits & 0x3fff) << 4), leading_((bits >> 16 & 0x3fff) << 4), stride_((bits >> 32 & 0x3fff) << 4) {
    const int mode = static_cast<int>(bits >> 62);
    crossed_ = mode == 0 ? 0 : 4 - mode;  // bits: three of 128 bytes, two of 64, one of 32
    if ((bits >> 49 & 7) != 0) machine.fail("wgmma: a base offset is not expected");
    if (crossed_ > 0 && start_ % (128u << crossed_) >= row_bytes()) machine.fail("wgmma: a tile that is not aligned");
  }

  // Columns multiplied: 16 of them, K-major.
  unsigned by_columns(unsigned row, unsigned k) const {
    const unsigned chunk = crossed_ > 0 ? 16 * (k / 8) : leading_ * (k / 8);
    return cross(start_ + row / 8 * stride_ + row % 8 * row_bytes() + chunk) + k % 8 * 2;
  }

  // Rows multiplied: 16 of them, MN-major; without crossing, the stride is that of columns.
  unsigned by_rows(unsigned column, unsigned k) const {
    const unsigned width = row_bytes() / 2, block = column / width, inside = column % width / 8 * 16;
    const unsigned blocks = crossed_ > 0 ? block * leading_ + k / 8 * stride_ : block * stride_ + k / 8 * leading_;
    return cross(start_ + blocks + k % 8 * row_bytes() + inside) + column % 8 * 2;
  }

 private:
  unsigned row_bytes() const { return 16u << crossed_; }
  unsigned cross(unsigned address) const { return address ^ (address >> 7 & ((1u << crossed_) - 1)) << 4; }

  unsigned start_, leading_, stride_;
  int crossed_;
};

// The products of all threads of a block.
class Products {
 public:
  void fence() { own().fenced = true; }

  // `product` in the thread's open group; its sums are gone until the wait.
  void begin(const Product& product) {
    Own& own = this->own();
    if (!own.fenced) machine.fail("wgmma: no wgmma.fence before the first product");
    compare(product);
    if (own.sums.count(product.sums) == 0) {
      own.sums[product.sums].assign(product.sums, product.sums + product.columns / 2);
      std::memset(product.sums, 0xff, product.columns / 2 * sizeof(float));
    }
    own.groups.back().push_back(product);
  }

  void commit() { own().groups.emplace_back(); }

  void wait(size_t groups) {
    Own& own = this->own();
    while (own.groups.size() > groups + 1) {
      for (const Product& product : own.groups.front()) compute(product, own.sums[product.sums]);
      own.groups.erase(own.groups.begin());
    }
    for (auto entry = own.sums.begin(); entry != own.sums.end();) {
      const bool pending = std::any_of(own.groups.begin(), own.groups.end(), [&](const std::vector<Product>& group) {
        return std::any_of(group.begin(), group.end(), [&](const Product& x) { return x.sums == entry->first; });
      });
      if (!pending) std::copy(entry->second.begin(), entry->second.end(), entry->first);
      entry = pending ? std::next(entry) : own.sums.erase(entry);
    }
    own.fenced = false;
  }

 private:
  struct Own {
    std::vector<std::vector<Product>> groups{1};  // that were committed, and at the end the open one
    std::map<float*, std::vector<float>> sums;    // what they will be
    bool fenced = false;
    size_t begun = 0;
  };

  Own& own() {
    if (block_ != machine.blocks_run) {
      block_ = machine.blocks_run;
      threads_.assign(blockDim.x * blockDim.y * blockDim.z, Own());
      begun_.assign(threads_.size() / 128 + 1, {});
      machine.at_block_end = [this] { check_counts(); };
    }
    return threads_[machine.number()];
  }

  // Each warp of a group must begin the same products in the same order.
  void compare(const Product& product) {
    std::vector<Product>& all = begun_[machine.number() / 128];
    const size_t i = own().begun++;
    if (i == all.size()) all.push_back(product);
    if (!all[i].same_instruction(product)) machine.fail("wgmma: the warps of a group begin different products");
  }

  void check_counts() {
    for (size_t t = 0; t < threads_.size(); ++t) {
      if (block_ != machine.blocks_run || threads_[t].begun == begun_[t / 128].size()) continue;
      machine.problem = "wgmma: the warps of a group begin different numbers of products";
    }
  }

  static float element(const Product& product, unsigned address) {
    uint16_t bits;
    std::memcpy(&bits, machine.shared_for_products(address), sizeof bits);
    return product.widen(bits);
  }

  static void compute(const Product& product, std::vector<float>& sums) {
    const unsigned lane = machine.current->lane, g = lane / 4, t = lane % 4;
    const unsigned first = machine.number() / 32 % 4 * 16 + g;
    const Descriptor b(product.b);
    float left[2][16];
    std::memcpy(left, product.left, sizeof left);
    if (!product.from_registers) {
      const Descriptor a(product.a);
      for (unsigned i = 0; i < 32; ++i) {
        left[i / 16][i % 16] = element(product, a.by_columns(first + i / 16 * 8, i % 16));
      }
    }
    for (int i = 0; i < product.columns / 4; ++i) {
      const unsigned column = i / 2 * 8 + 2 * t + i % 2;
      float upper = product.add ? sums[i / 2 * 4 + i % 2] : 0.0f;
      float lower = product.add ? sums[i / 2 * 4 + 2 + i % 2] : 0.0f;
      for (unsigned k = 0; k < 16; ++k) {
        const float right = element(product, product.from_registers ? b.by_rows(column, k) : b.by_columns(column, k));
        upper += left[0][k] * right;
        lower += left[1][k] * right;
      }
      sums[i / 2 * 4 + i % 2] = upper;
      sums[i / 2 * 4 + 2 + i % 2] = lower;
    }
  }

  uint64_t block_ = ~uint64_t{0};
  std::vector<Own> threads_;
  std::vector<std::vector<Product>> begun_;  // of each group, by the warp that is ahead
};

inline Products products;

}  // namespace emulation

namespace megashear {

constexpr bool kHasGroupProducts = true;

inline char* aligned_shared(void* memory) {
  return static_cast<char*>(memory) + (-emulation::machine.shared_address(memory) & 1023u);
}

template <int W>
uint64_t tile_descriptor(const void* address, int leading, int stride) {
  const uint64_t at = emulation::machine.shared_address(address), crossing = W == 64 ? 1 : W == 32 ? 2 : 3;
  if (at % 16 != 0 || leading % 16 != 0 || stride % 16 != 0) emulation::machine.fail("misaligned address: wgmma");
  return at >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | crossing << 62;
}

inline void show_to_products() { emulation::machine.show_to_products(); }

template <typename Value>
void store_for_products(void* shared, const Value& value) {
  static_assert(sizeof value == 16);
  emulation::machine.check_shared(shared, 16, "st.shared");
  std::memcpy(shared, &value, sizeof value);
  emulation::machine.hide_from_products(shared);
}

inline void begin_products() { emulation::products.fence(); }
inline void commit_products() { emulation::products.commit(); }

template <int N>
void wait_products() {
  emulation::products.wait(N);
}

template <int N>
void read_after_wait(float (&)[N][4]) {}

template <typename T>
float widen_bits(uint16_t bits) {
  return widen(T{bits});
}

template <typename T, int N>
void multiply_shared(float (&c)[N][4], uint64_t a, uint64_t b, bool add) {
  emulation::machine.wait(emulation::State::AtWarp, {__FILE__, __LINE__}, 0xffffffffu);
  emulation::products.begin({&c[0][0], 8 * N, a, b, false, add, {}, widen_bits<T>});
}

// Element (row, k) of A is in the thread 4 (row % 8) + k % 8 / 2, register row / 8 + 2 (k / 8), as of mma.
template <typename T, int N>
void multiply_registers(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b) {
  struct Registers {
    uint32_t of[4];
  };
  const emulation::Exchanged<Registers> all(Registers{{a[0], a[1], a[2], a[3]}}, 0xffffffffu, {__FILE__, __LINE__});
  emulation::Product product = {&c[0][0], 8 * N, 0, b, true, true, {}, widen_bits<T>};
  const int g = emulation::machine.current->lane / 4;
  for (int k = 0; k < 16; ++k) {
    const Registers words = all[4 * g + k % 8 / 2];
    for (int half = 0; half < 2; ++half) product.left[half][k] = half_of<T>(words.of[half + 2 * (k / 8)], k % 2);
  }
  emulation::products.begin(product);
}

}  // namespace megashear
