// merge.h: the table of merges, and merging a row of symbols: least rank first, the leftmost of equals.
//
// A short row is searched whole for every merge; a long one keeps its pairs in a heap, n log n whatever the text.
#pragma once

#include <cstdint>
#include <vector>

namespace megashear {

constexpr int32_t kNoSymbol = -1;

// `left` and `right` become `merged`; of several pairs in a row the least `rank` goes first.
struct Merge {
  int32_t left, right, rank, merged;
};

// A symbol and the byte at which it begins; it ends where the next one begins.
struct Symbol {
  int32_t symbol;
  uint32_t begin;
};

// Merges by their pair.
class MergeTable {
 public:
  explicit MergeTable(const std::vector<Merge>& merges = {});

  // The merge of a pair, null where there is none.
  const Merge* find(int32_t left, int32_t right) const {
    if (left == kNoSymbol || right == kNoSymbol) return nullptr;
    for (size_t place = first(left, right);; place = (place + 1) & mask_) {
      const Merge& entry = entries_[place];
      if (entry.left == left && entry.right == right) return &entry;
      if (entry.left == kNoSymbol) return nullptr;
    }
  }

 private:
  size_t first(int32_t left, int32_t right) const {
    const uint64_t pair = static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
    const uint64_t hash = pair * 0x9E3779B97F4A7C15u;
    return static_cast<size_t>(hash ^ hash >> 32) & mask_;
  }

  size_t mask_;
  std::vector<Merge> entries_;  // left is kNoSymbol where empty
};

// Merges a row until no pair of neighbours is in the table.
void merge_row(const MergeTable& table, std::vector<Symbol>& row);

}  // namespace megashear
