// cpu_tiles.h: arithmetic of one block of keys and queries, for every instruction set.
//
// A block of scores is [keys, queries]: keys down the rows, kBlock queries along the lanes, so that maxima, sums and
// statistics of queries are vertical and need no shuffle. All products are C[rows, lanes] += A[rows, words] B[words,
// lanes], where words run along the contraction: A is read a word at a time, B a vector of words.
// cpu_portable.h and cpu_avx512.h define tables of these functions per instruction set.
#pragma once

#include "cpu_vectors.h"

namespace megashear {

constexpr int64_t kBlock = 64;  // keys and queries of a block; also the distance of rows of lanes
constexpr int64_t kStep = 16;   // numbers of rows and lanes are multiples of this

struct Product {
  const Word* a;
  int64_t a_stride;
  const Word* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride, rows, lanes, words;
  bool add;  // to what C holds
};

// Which keys the queries of a block see: query `lane` sees key first[lane] and the more[lane] next ones. `partial`: not
// every query sees every key of the block.
struct Window {
  const int32_t *first, *more;
  int32_t key;  // of the block's first row
  bool partial;
};

// Online softmax over one more block of keys, for queries [lane, lanes): maximum, sum and P; `factor` is what sums so
// far must be multiplied with. `scale` turns scores into exponents of 2.
struct SoftmaxBlock {
  float *scores, *maximum, *sum, *factor;
  Word* p;
  int64_t keys, lane, lanes;
  float scale;
  Window window;
};

// P and dS of a block from scores and dO V^T. Their words run along queries in p_rows and ds_rows, along keys in ds.
struct GradientBlock {
  const float *scores, *dp, *lse, *delta;
  Word *p_rows, *ds_rows, *ds;
  int64_t keys, lane, lanes;
  float scale;
  Window window;
};

struct Tiles {
  const char* name;
  int64_t pair;  // elements in a word: 1 (fp32) or 2 (bf16)
  void (*product)(const Product&);
  void (*softmax)(const SoftmaxBlock&);
  void (*gradient)(const GradientBlock&);
  // to[c, r] = from[r, c]; rows a multiple of 16, columns of 8
  void (*transpose)(const Word* from, int64_t from_stride, Word* to, int64_t to_stride, int64_t rows, int64_t columns);
};

// Puts `hidden` where a lane's query does not see `key`: one unsigned comparison, since GCC 12 takes the conjunction of
// two comparisons of vectors apart, lane by lane.
template <int W>
MEGASHEAR_ROW void hide(typename Lanes<W>::Float& lanes, float hidden, const Window& window, int32_t key,
                        int64_t lane) {
  using BitsAt = typename Lanes<W>::BitsAt;
  const typename Lanes<W>::Float instead = typename Lanes<W>::Float{} + hidden;
  const typename Lanes<W>::Bits after_first =
      static_cast<uint32_t>(key) - *reinterpret_cast<const BitsAt*>(window.first + lane);
  lanes = after_first > *reinterpret_cast<const BitsAt*>(window.more + lane) ? instead : lanes;
}

template <int W>
MEGASHEAR_ROW void mask_and_maximum(const SoftmaxBlock& block, int64_t lane, typename Lanes<W>::Float& maximum) {
  using Float = typename Lanes<W>::Float;
  constexpr int kChains = 4;  // independent maxima, to hide their latency
  Float top[kChains];
  for (int i = 0; i < kChains; ++i) top[i] = maximum;
  for (int64_t k = 0; k < block.keys; k += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      float* row = block.scores + (k + i) * kBlock + lane;
      Float score;
      load<W>(score, row);
      if (block.window.partial) {
        hide<W>(score, 2.0f * kLowest, block.window, block.window.key + static_cast<int32_t>(k + i), lane);
        store<W>(row, score);
      }
      top[i] = top[i] > score ? top[i] : score;
    }
  }
  for (int i = 0; i < kChains; ++i) maximum = maximum > top[i] ? maximum : top[i];
}

template <int W, int PAIR>
MEGASHEAR_ROW void softmax_block(const SoftmaxBlock& block) {
  using Float = typename Lanes<W>::Float;
  for (int64_t lane = block.lane; lane < block.lanes; lane += W) {
    Float before, maximum, sum;
    load<W>(before, block.maximum + lane);
    load<W>(sum, block.sum + lane);
    maximum = before;
    mask_and_maximum<W>(block, lane, maximum);
    store<W>(block.maximum + lane, maximum);
    const Float shift = maximum * block.scale;
    Float factor = (before - maximum) * block.scale;  // 0 where nothing was seen yet, whatever a fused form would round
    power_of_two<W>(factor);
    store<W>(block.factor + lane, factor);
    sum *= factor;
    for (int64_t k = 0; k < block.keys; k += PAIR) {
      Float p[PAIR];
#pragma GCC unroll 2
      for (int i = 0; i < PAIR; ++i) {
        load<W>(p[i], block.scores + (k + i) * kBlock + lane);
        p[i] = p[i] * block.scale - shift;
        power_of_two<W>(p[i]);
        sum += p[i];
      }
      Word* words = block.p + k / PAIR * kBlock + lane;
      if constexpr (PAIR == 1) {
        store<W>(words, p[0]);
      } else {
        typename Lanes<W>::Bits both;
        pair_lanes<W>(both, p[0], p[1]);
        *reinterpret_cast<typename Lanes<W>::BitsAt*>(words) = both;
      }
    }
    store<W>(block.sum + lane, sum);
  }
}

// Writes two rows of lanes, k and k + 1, whose words run along the lanes.
template <int W>
MEGASHEAR_ROW void store_two_rows(Word* rows, int64_t k, int64_t lane, const typename Lanes<W>::Bits& both) {
  using Half = typename Lanes<W>::Half;
  using HalfAt = typename Lanes<W>::HalfAt;
  uint16_t* row = reinterpret_cast<uint16_t*>(rows) + k * kBlock + lane;
  *reinterpret_cast<HalfAt*>(row) = __builtin_convertvector(both & 0xffffu, Half);
  *reinterpret_cast<HalfAt*>(row + kBlock) = __builtin_convertvector(both >> 16, Half);
}

template <int W, int PAIR>
MEGASHEAR_ROW void gradient_block(const GradientBlock& block) {
  using Float = typename Lanes<W>::Float;
  using Bits = typename Lanes<W>::Bits;
  for (int64_t lane = block.lane; lane < block.lanes; lane += W) {
    Float lse, delta;
    load<W>(lse, block.lse + lane);
    load<W>(delta, block.delta + lane);
    for (int64_t k = 0; k < block.keys; k += PAIR) {
      Float p[PAIR], ds[PAIR];
#pragma GCC unroll 2
      for (int i = 0; i < PAIR; ++i) {
        load<W>(p[i], block.scores + (k + i) * kBlock + lane);
        load<W>(ds[i], block.dp + (k + i) * kBlock + lane);
        p[i] = p[i] * block.scale - lse;
        power_of_two<W>(p[i]);
        if (block.window.partial) {
          hide<W>(p[i], 0.0f, block.window, block.window.key + static_cast<int32_t>(k + i), lane);
        }
        ds[i] = p[i] * (ds[i] - delta);
      }
      Word* words = block.ds + k / PAIR * kBlock + lane;
      if constexpr (PAIR == 1) {
        store<W>(block.p_rows + k * kBlock + lane, p[0]);
        store<W>(words, ds[0]);
      } else {
        Bits both;
        pair_lanes<W>(both, p[0], p[1]);
        store_two_rows<W>(block.p_rows, k, lane, both);
        pair_lanes<W>(both, ds[0], ds[1]);
        store_two_rows<W>(block.ds_rows, k, lane, both);
        *reinterpret_cast<typename Lanes<W>::BitsAt*>(words) = both;
      }
    }
  }
}

}  // namespace megashear
