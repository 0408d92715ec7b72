// What happens to one tile of scores besides the matrix products: which keys a row sees, how a score is shaped
// (softcap, bias, ALiBi), and which probabilities dropout keeps.
//
// Row i stands at q0 + i + shift, key j at k0 + j; shift = valid keys - rows for causal 0 and 1, else 0. With
// base = q0 + shift - k0, row i sees keys i + base - left ... i + base + right, of those that are valid.
#pragma once
#include "cpu/attention.h"
#include "cpu/attention_gemm.h"
#include "cpu/keep.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int kKeys = 128;             // of a tile
constexpr int kChunks = kKeys / 16;    // of sixteen keys
constexpr int kMostRows = 256;         // of a tile
constexpr int kScoreRow = kKeys + 16;  // floats: rows must not all fall on the same cache sets
constexpr float kInfinity = __builtin_inff();

// One sequence (packed) or batch.
struct Sequence {
  int64_t batch, q_start, k_start, rows, keys, valid, base, left, right;
};

FASTLM_INLINE Sequence sequence_of(const Attention& a, int64_t batch) {
  Sequence s = {batch, 0, 0, a.q_length, a.k_length, 0, 0, a.left, a.causal == 1 || a.causal == 2 ? 0 : a.right};
  if (a.cu_q) {
    s.q_start = a.cu_q[batch];
    s.rows = a.cu_q[batch + 1] - s.q_start;
    s.k_start = a.cu_k[batch];
    s.keys = a.cu_k[batch + 1] - s.k_start;
  }
  s.valid = a.seqlens_k ? least(a.seqlens_k[batch], s.keys) : s.keys;
  s.base = a.q0 - a.k0 + (a.causal >= 2 ? 0 : s.valid - s.rows);
  return s;
}
FASTLM_INLINE char* place(const AttentionView& t, int64_t batch, int64_t head, int64_t row) {
  return t.p + (batch * t.s[0] + head * t.s[1] + row * t.s[2]) * size_of(t.dtype);
}
FASTLM_INLINE int64_t lse_place(const Attention& a, const Sequence& s, int64_t head) {
  return a.cu_q ? head * a.q_length + s.q_start : (s.batch * a.q_heads + head) * a.q_length;
}
FASTLM_INLINE int64_t first_key(const Sequence& s, int64_t i) { return s.left < 0 ? 0 : most(0, i + s.base - s.left); }
FASTLM_INLINE int64_t last_key(const Sequence& s, int64_t i) {  // one past
  return s.right < 0 ? s.valid : least(s.valid, i + s.base + s.right + 1);
}

// The keys of a tile that its rows see. Its rows are queries row0 ... of one head, or those of several heads that share
// a head of k, one head after the other: row r is query row0 + r % queries of head + r / queries. Of each panel of rows
// only keys [from, to), multiples of 16, are worked on.
struct Tile {
  int64_t head, row0, key0;
  int queries, rows, keys;
  int low, high;  // of all panels
  int from[kMostRows / kPanel], to[kMostRows / kPanel];
  const uint16_t* bits;  // a bool mask, kChunks words a row, or null
  int bits_row;          // 0: the same for all rows
};

// Few queries: those of so many heads that share a head of k stand in one block of rows.
constexpr int kFewRows = 64;       // of a block, at most; up to so many, keys are cut into pieces
constexpr int kStackQueries = 16;  // of a head, at most
FASTLM_INLINE int stacked_heads(const Attention& a) {
  const int64_t group = a.q_heads / a.k_heads;
  int stack = 1;
  for (int64_t n = 2; n <= group && n * a.longest_q <= kFewRows && a.longest_q <= kStackQueries; ++n) {
    if (group % n == 0) stack = static_cast<int>(n);
  }
  return stack;
}
// Whether rows are so few that scores are dot products: forward and backward need the same bits of a score.
FASTLM_INLINE bool scores_by_dots(const Attention& a) { return stacked_heads(a) * a.longest_q <= kPanel; }

struct Query {
  int64_t head, i;
};
FASTLM_INLINE Query query_of(const Tile& t, int row) {
  if (row < t.queries) return {t.head, t.row0 + row};
  const int heads = row / t.queries;
  return {t.head + heads, t.row0 + row - heads * t.queries};
}

// The bits of mask elements [from, to) of a row of n, 16 to a word; from and to are multiples of 16.
FASTLM_INLINE void mask_row(const char* p, int64_t stride, int from, int to, int n, uint16_t* bits) {
  int c = from;
#if FASTLM_ISA_avx512
  if (stride == 1) {
    for (; c < to; c += 64) {
      const int left = least(to, n) - c;
      const __mmask64 valid = left >= 64 ? ~0ull : (1ull << left) - 1;
      const __m512i x = _mm512_maskz_loadu_epi8(valid, p + c);
      const uint64_t word = _mm512_test_epi8_mask(x, x);
      memcpy(bits + c / 16, &word, to - c >= 64 ? 8 : static_cast<size_t>(to - c) / 8);
    }
    return;
  }
#endif
  for (; c < to; c += 16) {
    uint32_t word = 0;
    for (int i = 0; i < 16 && c + i < n; ++i) word |= static_cast<uint32_t>(p[(c + i) * stride] != 0) << i;
    bits[c / 16] = static_cast<uint16_t>(word);
  }
}

// Fills the tile's ranges; false if no row sees a key. `bits` has room for kChunks words a row.
FASTLM_NOINLINE bool look(const Attention& a, const Sequence& s, Tile& t, uint16_t* bits) {
  const int panels = static_cast<int>((t.rows + kPanel - 1) / kPanel);
  const bool masked = a.bias.p && a.bias.dtype == kBool;
  t.bits = masked ? bits : nullptr;
  t.bits_row = masked && (a.bias.s[2] != 0 || (t.rows > t.queries && a.bias.s[1] != 0)) ? kChunks : 0;
  t.low = kKeys;
  t.high = 0;
  if (masked && t.bits_row == 0) {  // one row for all
    mask_row(place(a.bias, s.batch, t.head, t.row0) + t.key0 * a.bias.s[3], a.bias.s[3], 0,
             static_cast<int>(round_up(t.keys, 16)), t.keys, bits);
  }
  for (int panel = 0; panel < panels; ++panel) {
    const int row = panel * kPanel, end = static_cast<int>(least(row + kPanel, t.rows));
    Query first = query_of(t, row), last = query_of(t, end - 1);
    if (first.head != last.head) first.i = t.row0, last.i = t.row0 + t.queries - 1;
    int from = static_cast<int>(least(most(first_key(s, first.i) - t.key0, 0), kKeys)) & ~15;
    int to = static_cast<int>(round_up(least(most(last_key(s, last.i) - t.key0, 0), t.keys), 16));
    if (masked && from < to) {
      uint16_t seen[kChunks] = {};
      for (int r = row; r < end; ++r) {
        uint16_t* of_row = bits + r * t.bits_row;
        const Query q = query_of(t, r);
        if (t.bits_row) {
          mask_row(place(a.bias, s.batch, q.head, q.i) + t.key0 * a.bias.s[3], a.bias.s[3], from, to, t.keys, of_row);
        }
        for (int c = 0; c < kChunks; ++c) seen[c] |= of_row[c];
        if (!t.bits_row) break;
      }
      while (from < to && !seen[from / 16]) from += 16;
      while (from < to && !seen[to / 16 - 1]) to -= 16;
    }
    if (from >= to) from = to = 0;
    t.from[panel] = from;
    t.to[panel] = to;
    if (from < to) {
      if (from < t.low) t.low = from;
      if (to > t.high) t.high = to;
    }
  }
  return t.low < t.high;
}

// The keys of [from, to) that one row, query i, sees, as bits of each chunk; `all` if it sees them all.
struct Seen {
  uint16_t bits[kChunks];
  bool all;
  FASTLM_INLINE Seen of(const Sequence& s, const Tile& t, int row, int64_t i, int from, int to) {
    Seen seen;
    const int begin = static_cast<int>(least(most(first_key(s, i) - t.key0, 0), kKeys));
    const int end = static_cast<int>(least(most(last_key(s, i) - t.key0, 0), t.keys));
    const bool inside = begin <= from && end >= to;
    seen.all = inside && !t.bits;
    if (seen.all) return seen;
    if (t.bits) {
      memcpy(seen.bits, t.bits + row * t.bits_row, sizeof seen.bits);
    } else {
      memset(seen.bits, 0xff, sizeof seen.bits);
    }
    for (int key = from; key < to && !inside; key += 16) {
      const int low = begin - key < 0 ? 0 : begin - key > 16 ? 16 : begin - key;
      const int high = end - key < 0 ? 0 : end - key > 16 ? 16 : end - key;
      seen.bits[key / 16] &= static_cast<uint16_t>(((1u << high) - 1) & ~((1u << low) - 1));
    }
    return seen;
  }
};

// Rows of a tensor as words: in place where they lie as the products want them, else packed into `scratch`.
struct Rows {
  const Word* p;
  int64_t step;  // words from row to row
  template <bool Pairs>
  FASTLM_INLINE Rows of(const AttentionView& t, const char* from, int64_t rows, int64_t rows_padded, int words, int n,
                        Word* scratch) {
    const bool in_place = t.dtype == (Pairs ? kBFloat16 : kFloat32) && t.s[3] == 1 && n == (Pairs ? 2 : 1) * words &&
                          rows == rows_padded && (!Pairs || t.s[2] % 2 == 0);
    if (in_place) return {reinterpret_cast<const Word*>(from), Pairs ? t.s[2] / 2 : t.s[2]};
    pack_rows<Pairs>(scratch, words, from, t.dtype, t.s[2], t.s[3], rows, rows_padded, n);
    return {scratch, words};
  }
};

// --- the shape of a score ---

// Whether scores need more than a positive scale.
FASTLM_INLINE bool shaped(const Attention& a) {
  return (a.bias.p && a.bias.dtype != kBool) || a.alibi || a.softcap > 0.0f || !(a.scale > 0.0);
}

// Keys [from, to) of row i: scale, softcap, bias, ALiBi. `slope` (if not null) gets the derivative of the softcap.
FASTLM_NOINLINE void shape(const Attention& a, const Sequence& s, int64_t head, int64_t i, const Tile& t, int from,
                           int to, float* scores, float* slope) {
  const bool biased = a.bias.p && a.bias.dtype != kBool;
  const int64_t stride = a.bias.s[3];
  const char* bias = biased ? place(a.bias, s.batch, head, i) : nullptr;
  const int bias_size = size_of(a.bias.dtype);
  const Vec scale = set1(static_cast<float>(a.scale)), cap = set1(a.softcap), one = set1(1.0f);
  const Vec minus_slope = set1(a.alibi ? -a.alibi[s.batch * a.alibi_batch + head] : 0.0f);
  static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int c = from; c < to; c += 16) {
    const int64_t key = t.key0 + c;
    Vec x = load(scores + c), factor = scale;
    if (a.softcap > 0.0f) {
      x = tanh(divide(x * scale, cap));
      factor = cap;
      if (slope) store(slope + c, (one - x) * (one + x));
    }
    if (biased) {
      const int n = t.keys - c;
      x = fma(x, factor,
              stride == 0 ? load_strided(bias, a.bias.dtype, 0, 16)
                          : load_strided(bias + key * stride * bias_size, a.bias.dtype, stride, n));
    } else {
      x = x * factor;
    }
    if (a.alibi) {
      const Vec distance = set1(static_cast<float>(key - s.base - i)) + load(lanes);
      x = fma(minus_slope, absolute(distance), x);
    }
    store(scores + c, x);
  }
}

// What a score in units of 1 / natural is above lse (`minus_lse` from it, -inf where the row sees nothing).
FASTLM_INLINE Vec exponent(Vec score, Factor natural, Vec minus_lse) {
  return fma(score, set1(natural.low), fma(score, set1(natural.high), minus_lse));
}

// --- dropout ---

// The decisions of one batch: rows of kKeys keys.
struct Dropout {
  Philox philox;
  uint32_t threshold;
  int64_t head0, q0, k0;
  FASTLM_INLINE Dropout of(const Attention& a, const Sequence& s) {
    Dropout d;
    d.philox = Philox::make(a.key);
    // Philox's rows count (query, head) as one 64-bit number; the batch enters where dropout_add_norm has a 0.
    d.philox.key1[0] ^= static_cast<uint32_t>(a.batch_ids ? a.batch_ids[s.batch] : s.batch);
    d.threshold = a.threshold;
    d.head0 = a.head0;
    d.q0 = a.q0;
    d.k0 = a.k0;
    return d;
  }
  FASTLM_INLINE void bits_of(const Keep& keep, uint16_t* bits) {
#if FASTLM_ISA_avx512
    memcpy(bits, keep.bits, 16);
#else
    for (int c = 0; c < 8; ++c) bits[c] = static_cast<uint16_t>(less(zero(), keep.choose(c, set1(1.0f))));
#endif
  }
  // bits[c]: keys key0 + 16c ... of query i
  inline __attribute__((always_inline)) void row(int64_t head, int64_t i, int64_t key0, uint16_t* bits) {
    philox.set_row(static_cast<uint64_t>(head0 + head) << 32 | static_cast<uint32_t>(q0 + i));
    const int64_t first = k0 + key0;
    const int skip = static_cast<int>(first & 7);
    Keep keep;
    keep.draw(philox, first >> 3, threshold);
    if (skip == 0) {
      bits_of(keep, bits);
      return;
    }
    uint16_t wide[2 * kChunks];
    bits_of(keep, wide);
    keep.draw(philox, (first >> 3) + 16, threshold);
    bits_of(keep, wide + kChunks);
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t two = static_cast<uint32_t>(wide[c + 1]) << 16 | wide[c];
      bits[c] = static_cast<uint16_t>(two >> skip);
    }
  }
};

// Scratch of one thread, handed out piece by piece; every piece starts on a cache line.
struct Pool {
  char* at;
  template <class T>
  inline __attribute__((always_inline)) T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
