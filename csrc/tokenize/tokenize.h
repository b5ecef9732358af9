// tokenize.h: byte-pair encoding of whole documents, exactly as SentencePiece and Hugging Face's tokenizers do it.
//
//   A text is a row of symbols, at first one a character. While two neighbours are in the table of merges, the pair of
//   the lowest rank, the leftmost of several, becomes one symbol. The remaining symbols are mapped to ids (Sennrich et al. 2016;
//   SentencePiece's scores, highest first, are ranks that several pairs may share).
//
// The text may be cut between two characters that no merged symbol and no whole piece holds side by side: nothing is ever
// merged across such a place, so the parts' ids back to back are the text's. This holds for every vocabulary; in LLaMA's
// such places are word boundaries, line ends, most punctuation and most Chinese characters. Parts ("words") come again
// and again, and a cache of fixed size remembers their ids.
//
// A space and U+2581 are one character here, as in models that escape spaces; pieces that hold a space themselves can
// never be reached and must be omitted.
// megashear/dataset/bpe.py builds the rules.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "id_buffer.h"
#include "merge.h"
#include "word_cache.h"

namespace megashear {

// The contents of a model file, by ids.
struct BpeRules {
  std::vector<std::string> texts;  // of every id; empty: never merged, and no character
  std::vector<int32_t> ranks;      // of every id: any two neighbours that make its text are merged at this rank
  std::vector<Merge> merges;       // or the merges themselves
  std::vector<int32_t> wholes;     // user-defined pieces: taken whole wherever they stand, the longest first
  std::vector<int32_t> bytes;      // of the 256 bytes, or empty: `unknown`, once for a run of unknown characters
  int32_t unknown = 0;
  bool prefix = true;  // a space is put before the text
};

// One tokenizer. Calls from several threads wait for each other.
class BpeEncoder {
 public:
  explicit BpeEncoder(const BpeRules& rules);

  // Appends the ids of `text` (valid UTF-8, below 2 GiB) to `ids`. Throws std::length_error.
  void encode(std::string_view text, IdBuffer& ids);

 private:
  struct Character {
    uint32_t code;
    size_t bytes;
  };

  static Character character(const char* text);
  void add_ranked_merges(const BpeRules& rules, std::vector<Merge>& merges);
  void add_neighbours(const std::string& text);
  bool joined(uint32_t left, uint32_t right) const;
  size_t word_end(std::string_view text, size_t begin) const;
  void encode_word(std::string_view word, const char* readable_end, IdBuffer& ids);
  void merge_word(std::string_view word, IdBuffer& ids);
  const std::pair<std::string, int32_t>* whole_at(std::string_view text) const;
  void spell(const Symbol& symbol, std::string_view text, IdBuffer& ids) const;
  void append(const int32_t* from, size_t count, IdBuffer& ids) const;

  int32_t vocabulary_, unknown_;
  bool prefix_;
  std::vector<int32_t> bytes_;
  // Symbols are ids, or from vocabulary_ on characters that only stand inside of pieces.
  std::vector<int32_t> symbol_of_;  // by code point; kNoSymbol where nothing can be made of a character
  std::vector<uint8_t> joined_ascii_;    // [128, 128]
  std::vector<uint64_t> joined_others_;  // bits by a hash of both characters: a superset is exact too
  std::vector<std::pair<std::string, int32_t>> wholes_[256];  // by first byte, longest first
  bool has_wholes_;
  MergeTable merges_;
  std::vector<Symbol> symbols_;
  IdBuffer word_ids_;
  WordCache<2, 4> short_words_;
  WordCache<8, 16> long_words_;
  std::mutex mutex_;
};

}  // namespace megashear
