// cpu_forward.h: the forward pass of one query head of one sequence, by blocks of queries over blocks of keys.
#pragma once

#include "cpu_blocking.h"

namespace megashear {

class ForwardHead {
 public:
  ForwardHead(const AttentionForward& pass, const Tiles& tiles, Word* memory)
      : pass_(pass), tiles_(tiles), plan_(pass.sizes, tiles), scratch_(memory) {
    const int64_t words = plan_.block_words();
    k_rows_ = scratch_.words(plan_.blocks * words);
    v_transposed_ = scratch_.words(plan_.blocks * words);
    rows_ = scratch_.words(words);
    pairs_ = scratch_.words(words);
    q_columns_ = scratch_.words(words);
    p_ = scratch_.words(kBlock * kBlock);
    scores_ = scratch_.floats(kBlock * kBlock);
    out_turned_ = scratch_.floats(plan_.padded * kBlock);
    out_ = scratch_.floats(plan_.padded * kBlock);
  }

  int64_t words_needed() const { return scratch_.used(); }

  void run(int64_t b, int64_t h) {
    const float z = pass_.mask == nullptr ? 1.0f : pass_.mask[h];
    float* lse = pass_.lse + (b * pass_.sizes.heads + h) * plan_.tokens;
    if (z == 0.0f) {
      write_zeros({pass_.out, pass_.dtype, b, h, 0, plan_.tokens, plan_.width});
      std::fill_n(lse, plan_.tokens, 0.0f);
      return;
    }
    const int64_t g = h * pass_.sizes.groups / pass_.sizes.heads;
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const int64_t begin = block * kBlock, tokens = plan_.tokens_in(block), words = plan_.block_words();
      read_rows({pass_.k, pass_.dtype, b, g, begin, tokens, plan_.width}, tiles_, 1.0f, k_rows_ + block * words);
      read_rows({pass_.v, pass_.dtype, b, g, begin, tokens, plan_.width}, tiles_, 1.0f, rows_);
      rearrange(rows_, plan_.padded, tiles_, nullptr, pairs_, v_transposed_ + block * words);
    }
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      query_block(b, h, block);
      finish(b, h, block, z, lse + block * kBlock);
    }
  }

 private:
  void query_block(int64_t b, int64_t h, int64_t block) {
    const int64_t begin = block * kBlock, tokens = plan_.tokens_in(block), lanes = rounded_up(tokens, kStep);
    read_rows({pass_.q, pass_.dtype, b, h, begin, tokens, plan_.width}, tiles_, 1.0f, rows_);
    rearrange(rows_, plan_.padded, tiles_, q_columns_, nullptr, nullptr);
    const Queries queries(pass_.first == nullptr ? nullptr : pass_.first + b * plan_.tokens, begin, tokens);
    std::fill_n(maximum_, kBlock, kLowest);
    std::fill_n(sum_, kBlock, 0.0f);
    std::fill_n(out_turned_, plan_.padded * kBlock, 0.0f);
    for (int64_t key_block = 0; key_block <= block; ++key_block) {
      if (!queries.see(key_block * kBlock, kBlock)) continue;
      visit_keys(key_block, block, tokens, [&](int64_t key, int64_t keys, int64_t lane) {
        add_keys(key, keys, lane, lanes, queries.window(key, keys, lane));
      });
    }
  }

  void add_keys(int64_t key, int64_t keys, int64_t lane, int64_t lanes, const Window& window) {
    tiles_.product({k_rows_ + key * plan_.row_words, plan_.row_words, q_columns_ + lane, kBlock, scores_ + lane, kBlock,
                    keys, lanes - lane, plan_.row_words, false});
    tiles_.softmax(
        {scores_, maximum_, sum_, factor_, p_, keys, lane, lanes, plan_.scale * kLog2E, window});
    scale_lanes(out_turned_ + lane, factor_ + lane, plan_.padded, lanes - lane);
    const Word* v = v_transposed_ + key / kBlock * plan_.block_words() + key % kBlock / plan_.pair;
    tiles_.product({v, kBlock / plan_.pair, p_ + lane, kBlock, out_turned_ + lane, kBlock, plan_.padded, lanes - lane,
                    keys / plan_.pair, true});
  }

  void finish(int64_t b, int64_t h, int64_t block, float z, float* lse) {
    const int64_t tokens = plan_.tokens_in(block);
    for (int64_t i = 0; i < tokens; ++i) {
      lse[i] = maximum_[i] * plan_.scale + std::log(sum_[i]);
      factor_[i] = z / sum_[i];
    }
    tiles_.transpose(reinterpret_cast<const Word*>(out_turned_), kBlock, reinterpret_cast<Word*>(out_), plan_.padded,
                     plan_.padded, kBlock);
    write_rows(out_, plan_.padded, factor_, {pass_.out, pass_.dtype, b, h, block * kBlock, tokens, plan_.width});
  }

  const AttentionForward& pass_;
  const Tiles& tiles_;
  const Plan plan_;
  Scratch scratch_;
  Word *k_rows_, *v_transposed_, *rows_, *pairs_, *q_columns_, *p_;
  float *scores_, *out_turned_, *out_;
  float maximum_[kBlock], sum_[kBlock], factor_[kBlock];
};

}  // namespace megashear
