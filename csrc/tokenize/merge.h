// merge.h: the table of merges, and merging a row of symbols: least rank first, the leftmost of equals.
//
// A short row is searched whole for every merge; a long one keeps its pairs in a heap, n log n whatever the text.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace megashear {

constexpr int32_t kNoSymbol = -1, kNoRank = INT32_MAX;
constexpr size_t kShortRow = 48;  // symbols

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

inline MergeTable::MergeTable(const std::vector<Merge>& merges) {
  size_t size = 16;
  while (size < 2 * merges.size()) size *= 2;
  mask_ = size - 1;
  entries_.assign(size, Merge{kNoSymbol, kNoSymbol, 0, 0});
  for (const Merge& merge : merges) {
    size_t place = first(merge.left, merge.right);
    while (entries_[place].left != kNoSymbol) place = (place + 1) & mask_;
    entries_[place] = merge;
  }
}

inline int32_t rank_of(const Merge* merge) { return merge == nullptr ? kNoRank : merge->rank; }

inline void merge_short_row(const MergeTable& table, std::vector<Symbol>& row) {
  int32_t ranks[kShortRow];
  size_t count = row.size();
  for (size_t i = 0; i + 1 < count; ++i) ranks[i] = rank_of(table.find(row[i].symbol, row[i + 1].symbol));
  while (count > 1) {
    const size_t at = static_cast<size_t>(std::min_element(ranks, ranks + count - 1) - ranks);
    if (ranks[at] == kNoRank) break;
    row[at].symbol = table.find(row[at].symbol, row[at + 1].symbol)->merged;
    --count;
    for (size_t i = at + 1; i < count; ++i) {
      row[i] = row[i + 1];
      ranks[i - 1] = ranks[i];
    }
    if (at > 0) ranks[at - 1] = rank_of(table.find(row[at - 1].symbol, row[at].symbol));
    if (at + 1 < count) ranks[at] = rank_of(table.find(row[at].symbol, row[at + 1].symbol));
  }
  row.resize(count);
}

// A symbol of a long row, with its neighbours and the merge with the next one.
struct Link {
  int32_t symbol;
  uint32_t begin;
  uint32_t previous, next;  // kEnd at the ends
  int32_t rank, merged;
};

constexpr uint32_t kEnd = UINT32_MAX;

class LongRow {
 public:
  LongRow(const MergeTable& table, const std::vector<Symbol>& row) : table_(table), links_(row.size()) {
    std::vector<uint64_t> pairs;
    for (size_t i = 0; i < row.size(); ++i) {
      const uint32_t at = static_cast<uint32_t>(i);
      links_[i] = {row[i].symbol, row[i].begin, i == 0 ? kEnd : at - 1, i + 1 == row.size() ? kEnd : at + 1, kNoRank, 0};
    }
    for (uint32_t i = 0; i < links_.size(); ++i) {
      if (rank(i)) pairs.push_back(entry(i));
    }
    heap_ = Heap(std::greater<uint64_t>(), std::move(pairs));
  }

  void merge() {
    while (!heap_.empty()) {
      const uint64_t top = heap_.top();
      heap_.pop();
      const uint32_t at = static_cast<uint32_t>(top);
      if (links_[at].rank == static_cast<int32_t>(top >> 32)) merge_at(at);  // else the pair is no longer there
    }
  }

  void store(std::vector<Symbol>& row) const {
    row.clear();
    for (uint32_t i = 0; i != kEnd; i = links_[i].next) row.push_back({links_[i].symbol, links_[i].begin});
  }

 private:
  using Heap = std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<uint64_t>>;

  // Least rank first, then the leftmost.
  uint64_t entry(uint32_t at) const {
    return static_cast<uint64_t>(static_cast<uint32_t>(links_[at].rank)) << 32 | at;
  }

  // Looks up the pair that begins at a link; whether it can be merged.
  bool rank(uint32_t at) {
    Link& link = links_[at];
    const Merge* found = link.next == kEnd ? nullptr : table_.find(link.symbol, links_[link.next].symbol);
    link.rank = rank_of(found);
    link.merged = found == nullptr ? 0 : found->merged;
    return found != nullptr;
  }

  void merge_at(uint32_t at) {
    Link& link = links_[at];
    Link& gone = links_[link.next];
    link.symbol = link.merged;
    link.next = gone.next;
    gone.rank = kNoRank;
    if (link.next != kEnd) links_[link.next].previous = at;
    if (rank(at)) heap_.push(entry(at));
    if (link.previous != kEnd && rank(link.previous)) heap_.push(entry(link.previous));
  }

  const MergeTable& table_;
  std::vector<Link> links_;
  Heap heap_;
};

// Merges a row until no pair of neighbours is in the table.
inline void merge_row(const MergeTable& table, std::vector<Symbol>& row) {
  if (row.size() <= kShortRow) {
    merge_short_row(table, row);
  } else {
    LongRow links(table, row);
    links.merge();
    links.store(row);
  }
}

}  // namespace megashear
