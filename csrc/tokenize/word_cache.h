// word_cache.h: the ids of words seen before, in a table of fixed size.
//
// A slot holds a word of up to 8 * kWords - 1 bytes and up to kIds ids; whole words are compared, never hashes alone.
// Two slots share a bucket, the one used last stays.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace megashear {

template <size_t kWords, size_t kIds>
class WordCache {
 public:
  static constexpr size_t kLongest = 8 * kWords - 1, kMostIds = kIds;

  using Key = std::array<uint64_t, kWords>;  // the bytes, then zeros, the length in the last byte

  struct Slot {
    Key key{};  // all zero: empty, no word has length 0
    std::array<int32_t, kIds> ids{};  // -1 after the last

    size_t count() const {
      size_t counted = 1;
      for (size_t i = 1; i < kIds; ++i) counted += ids[i] >= 0;
      return counted;
    }
  };

  explicit WordCache(unsigned bucket_bits) : shift_(64 - bucket_bits), buckets_(size_t{1} << bucket_bits) {}

  // `word` has 1 to kLongest bytes; up to `readable_end` memory may be read.
  static Key key_of(const char* word, size_t length, const char* readable_end) {
    Key key{};
    if (kWords == 2 && static_cast<size_t>(readable_end - word) >= sizeof key) {
      std::memcpy(key.data(), word, sizeof key);
      const uint64_t ones = ~uint64_t{0};
      key[0] &= length >= 8 ? ones : ones >> (64 - 8 * length);
      key[1] &= length <= 8 ? 0 : ones >> (128 - 8 * length);
    } else {
      std::memcpy(key.data(), word, length);
    }
    key[kWords - 1] |= static_cast<uint64_t>(length) << 56;
    return key;
  }

  // The slot of a word, null where it is not remembered.
  const Slot* find(const Key& key) {
    std::array<Slot, 2>& bucket = bucket_of(key).slots;
    if (same(bucket[0].key, key)) return &bucket[0];
    if (!same(bucket[1].key, key)) return nullptr;
    std::swap(bucket[0], bucket[1]);
    return &bucket[0];
  }

  // Remembers a word of 1 to kIds ids in place of its bucket's older one.
  void insert(const Key& key, const int32_t* ids, size_t count) {
    std::array<Slot, 2>& bucket = bucket_of(key).slots;
    bucket[1] = bucket[0];
    bucket[0].key = key;
    bucket[0].ids.fill(-1);
    std::memcpy(bucket[0].ids.data(), ids, count * sizeof *ids);
  }

 private:
  struct alignas(64) Bucket {  // no short word's bucket lies in two cache lines
    std::array<Slot, 2> slots;
  };

  static bool same(const Key& a, const Key& b) {
    uint64_t difference = 0;
    for (size_t i = 0; i < kWords; ++i) difference |= a[i] ^ b[i];
    return difference == 0;
  }

  Bucket& bucket_of(const Key& key) {
    uint64_t hash = 0;
    for (const uint64_t part : key) hash = ((hash ^ (hash >> 32)) + part) * 0x9E3779B97F4A7C15u;
    return buckets_[static_cast<size_t>((hash ^ (hash >> 29)) * 0xBF58476D1CE4E5B9u >> shift_)];
  }

  unsigned shift_;
  std::vector<Bucket> buckets_;
};

}  // namespace megashear
