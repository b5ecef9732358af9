// cpu_blocking.h: blocks of one head, and scratch memory of a thread.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu_operands.h"

namespace megashear {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// Numbers that both passes use, in elements, words or blocks.
struct Plan {
  int64_t tokens, width, padded, row_words, pair, blocks;
  float scale;  // of scores
  explicit Plan(const AttentionSizes& sizes, const Tiles& tiles)
      : tokens(sizes.tokens),
        width(sizes.head_dim),
        padded(rounded_up(sizes.head_dim, kStep)),
        row_words(padded / tiles.pair),
        pair(tiles.pair),
        blocks((sizes.tokens + kBlock - 1) / kBlock),
        scale(1.0f / std::sqrt(static_cast<float>(sizes.head_dim))) {}

  int64_t tokens_in(int64_t block) const { return std::min(kBlock, tokens - block * kBlock); }
  int64_t block_words() const { return kBlock * row_words; }  // of a block of one head, in any form
  int64_t pair_row(int64_t token) const { return token / pair; }
};

// Hands out pieces of one thread's memory, each at a cache line; with no memory it only counts them.
class Scratch {
 public:
  explicit Scratch(Word* memory) : memory_(memory) {}
  Word* words(int64_t count) {
    Word* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += rounded_up(count, 16);
    return piece;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(words(count)); }
  int64_t used() const { return used_; }

 private:
  Word* memory_;
  int64_t used_ = 0;
};

// Which keys the queries of one block see: from `first` to themselves. Lanes beyond the last token see some keys too,
// nothing of theirs is kept.
struct Queries {
  int32_t begin, first[kBlock], more[kBlock];
  int32_t least_first, greatest_first;

  Queries(const int32_t* first_of_token, int64_t begin_, int64_t tokens) : begin(static_cast<int32_t>(begin_)) {
    for (int32_t i = 0; i < kBlock; ++i) {
      first[i] = first_of_token == nullptr || i >= tokens ? 0 : std::clamp(first_of_token[begin + i], 0, begin + i);
      more[i] = begin + i - first[i];
    }
    least_first = *std::min_element(first, first + tokens);
    greatest_first = *std::max_element(first, first + tokens);
  }

  bool see(int64_t key, int64_t keys) const { return least_first < key + keys; }

  // Of the block of `keys` keys from `key`, for lanes from `lane`.
  Window window(int64_t key, int64_t keys, int64_t lane) const {
    return {first, more, static_cast<int32_t>(key), key + keys - 1 > begin + lane || greatest_first > key};
  }
};

// Calls visit(key, keys, lane) for the parts of a block of keys that queries of block `query_block` may see: the whole
// block, or on the diagonal steps of kStep keys, each for the lanes from its own on.
template <typename Visit>
void visit_keys(int64_t key_block, int64_t query_block, int64_t queries, Visit visit) {
  if (key_block < query_block) return visit(key_block * kBlock, kBlock, int64_t{0});
  for (int64_t lane = 0; lane < queries; lane += kStep) visit(key_block * kBlock + lane, kStep, lane);
}

}  // namespace megashear
