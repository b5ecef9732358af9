#include <algorithm>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "tokenize.h"

namespace megashear {
namespace {

constexpr uint32_t kSpace = ' ', kEscapedSpace = 0x2581;
constexpr size_t kKeptSymbols = 1 << 16;
constexpr unsigned kJoinedBits = 17;
constexpr unsigned kShortBuckets = 17, kLongBuckets = 12;  // powers of two: 8 MiB and 1 MiB

size_t joined_bit(uint32_t left, uint32_t right) {
  return ((left * 0x9E3779B1u) ^ (right * 0x85EBCA6Bu)) >> (32 - kJoinedBits);
}

uint32_t unescaped(uint32_t code) { return code == kEscapedSpace ? kSpace : code; }

// The text with spaces for U+2581.
std::string without_escapes(std::string_view text) {
  constexpr std::string_view escape = "\xE2\x96\x81";
  std::string plain;
  for (size_t at = 0; at < text.size();) {
    const bool escaped = text.substr(at, escape.size()) == escape;
    plain += escaped ? ' ' : text[at];
    at += escaped ? escape.size() : 1;
  }
  return plain;
}

}  // namespace

BpeEncoder::BpeEncoder(const BpeRules& rules)
    : vocabulary_(static_cast<int32_t>(rules.texts.size())),
      unknown_(rules.unknown),
      prefix_(rules.prefix),
      bytes_(rules.bytes),
      symbol_of_(0x110000, kNoSymbol),
      joined_ascii_(128 * 128),
      joined_others_((size_t{1} << kJoinedBits) / 64),
      has_wholes_(!rules.wholes.empty()),
      short_words_(kShortBuckets),
      long_words_(kLongBuckets) {
  for (int32_t id = 0; id < vocabulary_; ++id) {
    const std::string& text = rules.texts[static_cast<size_t>(id)];
    if (!text.empty() && character(text.data()).bytes == text.size()) symbol_of_[character(text.data()).code] = id;
  }
  std::vector<Merge> merges = rules.merges;
  if (!rules.ranks.empty()) add_ranked_merges(rules, merges);
  merges_ = MergeTable(merges);
  for (const Merge& merge : merges) add_neighbours(rules.texts.at(static_cast<size_t>(merge.merged)));
  for (const int32_t id : rules.wholes) {
    const std::string piece = without_escapes(rules.texts.at(static_cast<size_t>(id)));
    wholes_[static_cast<uint8_t>(piece.at(0))].emplace_back(piece, id);
    add_neighbours(piece);
  }
  for (auto& wholes : wholes_) {
    std::sort(wholes.begin(), wholes.end(), [](auto& a, auto& b) { return a.first.size() > b.first.size(); });
  }
}

// Every cut of a piece into two texts that can be symbols is a merge. User-defined pieces are never merged.
void BpeEncoder::add_ranked_merges(const BpeRules& rules, std::vector<Merge>& merges) {
  std::unordered_map<std::string_view, int32_t> ids;
  for (int32_t id = 0; id < vocabulary_; ++id) ids.emplace(rules.texts[static_cast<size_t>(id)], id);
  const std::unordered_set<int32_t> wholes(rules.wholes.begin(), rules.wholes.end());
  int32_t symbols = vocabulary_;
  const auto symbol = [&](std::string_view text) {
    const auto found = ids.find(text);
    if (found != ids.end()) return wholes.count(found->second) > 0 ? kNoSymbol : found->second;
    const Character only = character(text.data());
    if (only.bytes != text.size()) return kNoSymbol;
    if (symbol_of_[only.code] == kNoSymbol) symbol_of_[only.code] = symbols++;
    return symbol_of_[only.code];
  };
  for (int32_t id = 0; id < vocabulary_; ++id) {
    const std::string_view text = rules.texts[static_cast<size_t>(id)];
    if (wholes.count(id) > 0) continue;
    for (size_t cut = 0; cut < text.size();) {
      cut += character(text.data() + cut).bytes;
      if (cut == text.size()) break;
      const int32_t left = symbol(text.substr(0, cut)), right = symbol(text.substr(cut));
      const int32_t rank = rules.ranks.at(static_cast<size_t>(id));
      if (left != kNoSymbol && right != kNoSymbol) merges.push_back({left, right, rank, id});
    }
  }
}

// Remembers which characters stand side by side in a piece.
void BpeEncoder::add_neighbours(const std::string& text) {
  Character left = character(text.data());
  for (size_t at = left.bytes; at < text.size();) {
    const Character right = character(text.data() + at);
    if (left.code < 128 && right.code < 128) joined_ascii_[left.code * 128 + right.code] = 1;
    joined_others_[joined_bit(left.code, right.code) / 64] |= uint64_t{1} << joined_bit(left.code, right.code) % 64;
    at += right.bytes;
    left = right;
  }
}

BpeEncoder::Character BpeEncoder::character(const char* text) {
  const auto byte = [text](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text[i])); };
  const uint32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xE0) return {(lead & 0x1F) << 6 | (byte(1) & 0x3F), 2};
  if (lead < 0xF0) return {unescaped((lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F)), 3};
  return {(lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F), 4};
}

// Whether a merge or a whole piece may reach over the place between two characters.
inline bool BpeEncoder::joined(uint32_t left, uint32_t right) const {
  if (left < 128 && right < 128) return joined_ascii_[left * 128 + right];
  return joined_others_[joined_bit(left, right) / 64] >> joined_bit(left, right) % 64 & 1;
}

// Where the word ends that begins at `begin`.
inline size_t BpeEncoder::word_end(std::string_view text, size_t begin) const {
  Character last = character(text.data() + begin);
  size_t end = begin + last.bytes;
  while (end < text.size()) {
    const Character next = character(text.data() + end);
    if (!joined(last.code, next.code)) break;
    end += next.bytes;
    last = next;
  }
  return end;
}

void BpeEncoder::encode(std::string_view text, IdBuffer& ids) {
  if (text.size() >= INT32_MAX) throw std::length_error("a text of 2 GiB or more cannot be tokenised");
  if (text.empty()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  ids.room(text.size() / 3 + 16);
  size_t begin = 0;
  if (prefix_) {
    begin = word_end(text, 0);
    const std::string first = " " + std::string(text.substr(0, begin));
    encode_word(first, first.data() + first.size(), ids);
  }
  const char* readable_end = text.data() + text.size();
  for (size_t end; begin < text.size(); begin = end) {
    end = word_end(text, begin);
    encode_word(text.substr(begin, end - begin), readable_end, ids);
  }
  if (symbols_.capacity() > kKeptSymbols) {  // after a very long word
    symbols_ = {};
    word_ids_ = {};
  }
}

inline void BpeEncoder::encode_word(std::string_view word, const char* readable_end, IdBuffer& ids) {
  const auto cached = [&](auto& cache) {
    const auto key = cache.key_of(word.data(), word.size(), readable_end);
    if (const auto* slot = cache.find(key)) {
      if (bytes_.empty()) return append(slot->ids.data(), slot->count(), ids);
      std::memcpy(ids.room(cache.kMostIds), slot->ids.data(), sizeof slot->ids);  // a fixed size is copied faster
      return ids.added(slot->count());
    }
    merge_word(word, word_ids_);
    if (word_ids_.size() <= cache.kMostIds) cache.insert(key, word_ids_.data(), word_ids_.size());
    append(word_ids_.data(), word_ids_.size(), ids);
  };
  if (word.size() <= short_words_.kLongest) return cached(short_words_);
  if (word.size() <= long_words_.kLongest) return cached(long_words_);
  merge_word(word, word_ids_);
  append(word_ids_.data(), word_ids_.size(), ids);
}

// The ids of one word, without the cache.
void BpeEncoder::merge_word(std::string_view word, IdBuffer& ids) {
  const std::string plain = has_wholes_ ? without_escapes(word) : std::string();
  if (has_wholes_) word = plain;
  symbols_.clear();
  ids.clear();
  for (size_t at = 0; at < word.size();) {
    const auto* whole = has_wholes_ ? whole_at(word.substr(at)) : nullptr;
    const Character next = character(word.data() + at);
    symbols_.push_back({whole == nullptr ? symbol_of_[next.code] : whole->second, static_cast<uint32_t>(at)});
    at += whole == nullptr ? next.bytes : whole->first.size();
  }
  merge_row(merges_, symbols_);
  for (size_t i = 0; i < symbols_.size(); ++i) {
    const size_t end = i + 1 < symbols_.size() ? symbols_[i + 1].begin : word.size();
    spell(symbols_[i], word.substr(symbols_[i].begin, end - symbols_[i].begin), ids);
  }
}

// The longest user-defined piece that the text begins with, or null.
const std::pair<std::string, int32_t>* BpeEncoder::whole_at(std::string_view text) const {
  for (const auto& whole : wholes_[static_cast<uint8_t>(text[0])]) {
    if (text.substr(0, whole.first.size()) == whole.first) return &whole;
  }
  return nullptr;
}

// The ids of one symbol; a character outside of the vocabulary by its bytes.
void BpeEncoder::spell(const Symbol& symbol, std::string_view text, IdBuffer& ids) const {
  if (symbol.symbol != kNoSymbol && symbol.symbol < vocabulary_) {
    append(&symbol.symbol, 1, ids);
  } else if (bytes_.empty()) {
    append(&unknown_, 1, ids);
  } else {
    for (const char byte : text == " " ? std::string_view("\xE2\x96\x81") : text) {
      ids.add(&bytes_[static_cast<uint8_t>(byte)], 1);
    }
  }
}

// Adds ids to the end; without ids for bytes, a run of unknown characters is one id.
inline void BpeEncoder::append(const int32_t* from, size_t count, IdBuffer& ids) const {
  const bool run = bytes_.empty() && ids.size() > 0 && ids.data()[ids.size() - 1] == unknown_ && *from == unknown_;
  ids.add(from + run, count - run);
}

}  // namespace megashear
