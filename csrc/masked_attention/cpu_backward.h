// cpu_backward.h: the backward pass of one query group of one sequence: its heads one after another, blocks of queries over
// blocks of keys, so that the sums of dk and dv over heads and queries have one order and one owner.
#pragma once

#include "cpu_blocking.h"

namespace megashear {

class BackwardGroup {
 public:
  BackwardGroup(const AttentionBackward& pass, const Tiles& tiles, Word* memory)
      : pass_(pass), forward_(pass.forward), tiles_(tiles), plan_(pass.forward.sizes, tiles), scratch_(memory) {
    const int64_t words = plan_.block_words();
    for (Word** form : {&k_rows_, &k_transposed_, &v_rows_}) *form = scratch_.words(plan_.blocks * words);
    for (float** sum : {&dk_, &dv_}) *sum = scratch_.floats(plan_.blocks * kBlock * plan_.padded);
    for (Word** form : {&rows_, &pairs_, &q_columns_, &q_pairs_, &dout_columns_, &dout_pairs_}) {
      *form = scratch_.words(words);
    }
    for (Word** part : {&p_rows_, &ds_rows_, &ds_}) *part = scratch_.words(kBlock * kBlock);
    if (plan_.pair == 1) ds_rows_ = ds_;  // words of one element run along both
    for (float** part : {&scores_, &dp_}) *part = scratch_.floats(kBlock * kBlock);
    for (float** sum : {&dq_transposed_, &dq_}) *sum = scratch_.floats(plan_.padded * kBlock);
  }

  int64_t words_needed() const { return scratch_.used(); }

  void run(int64_t b, int64_t g) {
    const int64_t queries = forward_.sizes.heads / forward_.sizes.groups;
    read_keys(b, g);
    std::fill_n(dk_, plan_.blocks * kBlock * plan_.padded, 0.0f);
    std::fill_n(dv_, plan_.blocks * kBlock * plan_.padded, 0.0f);
    for (int64_t h = g * queries; h < (g + 1) * queries; ++h) head(b, h);
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      write(dk_ + block * kBlock * plan_.padded, plan_.scale, rows(pass_.dk, b, g, block));
      write(dv_ + block * kBlock * plan_.padded, 1.0f, rows(pass_.dv, b, g, block));
    }
  }

 private:
  Rows rows(const AttentionTensor& tensor, int64_t b, int64_t h, int64_t block) const {
    return {tensor, forward_.dtype, b, h, block * kBlock, plan_.tokens_in(block), plan_.width};
  }

  void read_keys(int64_t b, int64_t g) {
    for (int64_t block = 0; block < plan_.blocks; ++block) {
      const int64_t offset = block * plan_.block_words();
      read_rows(rows(forward_.k, b, g, block), tiles_, 1.0f, k_rows_ + offset);
      rearrange(k_rows_ + offset, plan_.padded, tiles_, nullptr, pairs_, k_transposed_ + offset);
      read_rows(rows(forward_.v, b, g, block), tiles_, 1.0f, v_rows_ + offset);
    }
  }

  void head(int64_t b, int64_t h) {
    const float z = forward_.mask == nullptr ? 1.0f : forward_.mask[h];
    double dz = 0.0;
    if (z == 0.0f) {
      write_zeros({pass_.dq, forward_.dtype, b, h, 0, plan_.tokens, plan_.width});
    } else {
      for (int64_t block = 0; block < plan_.blocks; ++block) dz += query_block(b, h, block, z);
      dz /= static_cast<double>(z);
    }
    if (pass_.scratch != nullptr) pass_.scratch[b * forward_.sizes.heads + h] = static_cast<float>(dz);
  }

  // Returns the sum of delta over the block's queries.
  double query_block(int64_t b, int64_t h, int64_t block, float z) {
    const int64_t begin = block * kBlock, tokens = plan_.tokens_in(block), lanes = rounded_up(tokens, kStep);
    read_queries(b, h, block, z);
    std::fill_n(dq_transposed_, plan_.padded * kBlock, 0.0f);
    const Queries queries(forward_.first == nullptr ? nullptr : forward_.first + b * plan_.tokens, begin, tokens);
    for (int64_t key_block = 0; key_block <= block; ++key_block) {
      if (!queries.see(key_block * kBlock, kBlock)) continue;
      visit_keys(key_block, block, tokens, [&](int64_t key, int64_t keys, int64_t lane) {
        add_keys(key, keys, lane, lanes, queries.window(key, keys, lane));
      });
    }
    tiles_.transpose(reinterpret_cast<const Word*>(dq_transposed_), kBlock, reinterpret_cast<Word*>(dq_), plan_.padded,
                     plan_.padded, kBlock);
    write(dq_, plan_.scale, rows(pass_.dq, b, h, block));
    double sum = 0.0;
    for (int64_t i = 0; i < tokens; ++i) sum += static_cast<double>(delta_[i]);
    return sum;
  }

  void read_queries(int64_t b, int64_t h, int64_t block, float z) {
    const Rows dout = rows(pass_.dout, b, h, block);
    read_rows(rows(forward_.q, b, h, block), tiles_, 1.0f, rows_);
    rearrange(rows_, plan_.padded, tiles_, q_columns_, q_pairs_, nullptr);
    read_rows(dout, tiles_, z, rows_);
    rearrange(rows_, plan_.padded, tiles_, dout_columns_, dout_pairs_, nullptr);
    const float* lse = forward_.lse + (b * forward_.sizes.heads + h) * plan_.tokens + dout.begin;
    std::fill_n(lse_, kBlock, 0.0f);
    std::fill_n(delta_, kBlock, 0.0f);
    for (int64_t i = 0; i < dout.tokens; ++i) lse_[i] = lse[i] * kLog2E;
    dot(dout, rows(forward_.out, b, h, block), delta_);
  }

  // Adds what queries of the lanes [lane, lanes) and `keys` keys from `key` give to the gradients of both.
  void add_keys(int64_t key, int64_t keys, int64_t lane, int64_t lanes, const Window& window) {
    const int64_t padded = plan_.padded, words = plan_.row_words, pair = plan_.pair, count = lanes - lane;
    tiles_.product({k_rows_ + key * words, words, q_columns_ + lane, kBlock, scores_ + lane, kBlock, keys, count, words,
                    false});
    tiles_.product({v_rows_ + key * words, words, dout_columns_ + lane, kBlock, dp_ + lane, kBlock, keys, count, words,
                    false});
    tiles_.gradient({scores_, dp_, lse_, delta_, p_rows_, ds_rows_, ds_, keys, lane, lanes, plan_.scale * kLog2E,
                     window});
    const int64_t skipped = lane / pair, pairs = count / pair, row = kBlock / pair;
    tiles_.product({p_rows_ + skipped, row, dout_pairs_ + skipped * padded, padded, dv_ + key * padded, padded, keys,
                    padded, pairs, true});
    tiles_.product({ds_rows_ + skipped, row, q_pairs_ + skipped * padded, padded, dk_ + key * padded, padded, keys,
                    padded, pairs, true});
    const Word* k = k_transposed_ + key / kBlock * plan_.block_words() + key % kBlock / pair;
    tiles_.product({k, row, ds_ + lane, kBlock, dq_transposed_ + lane, kBlock, padded, count, keys / pair, true});
  }

  void write(const float* from, float factor, const Rows& to) {
    std::fill_n(factor_, kBlock, factor);
    write_rows(from, plan_.padded, factor_, to);
  }

  const AttentionBackward& pass_;
  const AttentionForward& forward_;
  const Tiles& tiles_;
  const Plan plan_;
  Scratch scratch_;
  Word *k_rows_, *k_transposed_, *v_rows_, *rows_, *pairs_, *q_columns_, *q_pairs_, *dout_columns_, *dout_pairs_;
  Word *p_rows_, *ds_rows_, *ds_;
  float *scores_, *dp_, *dq_transposed_, *dq_, *dk_, *dv_;
  float lse_[kBlock], delta_[kBlock], factor_[kBlock];
};

}  // namespace megashear
