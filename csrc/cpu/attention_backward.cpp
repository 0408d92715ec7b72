// Attention, backward: from dout (and dlse) the gradients of q, k, v and the bias. Probabilities are worked out again:
//
//     p = exp(shape(q k^T) - lse - rest);  delta = sum(dout * out) - dlse;  ds = p * (keep * dout v^T - delta)
//     dv = (keep * p)^T dout;  dk = scale * ds^T q;  dq = scale * ds k;  dbias = the sum of ds over its broadcast axes
//     dsink = -sum(exp(sink - lse - rest) * delta)
//
// Five products of rows x keys x head size. An item of work owns one head of k and v, or one of its segments of keys
// where heads are few: it walks over tiles of keys, and within each over the query heads and rows that see them, in
// fixed order. dk and dv of a tile stay in cache; dq gathers in float32 scratch, segment by segment, and segments are
// added in order. Where they begin depends on the number of keys alone, so no sum depends on the number of threads, nor
// on which other heads and batches the call has: a shard's gradients are the bits of the whole. Where batches or heads
// share elements of dbias, they take turns, and within a turn every item owns its part of dbias.
#include <stdlib.h>

#include "cpu/attention_tile.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kRows = 64;     // of a tile
constexpr int kSegments = 4;  // of the keys of a head, at most, none below kSegmentKeys
constexpr int64_t kSegmentKeys = 256;

struct Plan {
  int segments, pieces;              // pieces: segments that are items of their own, or 1
  int words, columns, padded;        // of q and k: words of a packed row, columns (a multiple of 16), floats of a row
  int v_words, v_columns, v_padded;  // of v and dout
  int64_t depth, v_depth;            // words that are summed
  int64_t group, dq_rows;            // query heads of a head of k; rows of dq's scratch of one head
  int64_t turns_b, turns_h, own_b, own_h;  // batches and heads of k that take turns, and those within a turn
  int64_t dq_floats;                       // of one item
};

template <bool Pairs>
Plan plan_of(const Attention& a) {
  Plan p;
  p.padded = static_cast<int>(round_up(a.head_size, Pairs ? 32 : 16));
  p.words = Pairs ? p.padded / 2 : p.padded;
  p.depth = Pairs ? (a.head_size + 1) / 2 : a.head_size;
  p.columns = static_cast<int>(round_up(a.head_size, 16));
  p.v_padded = static_cast<int>(round_up(a.v_head_size, Pairs ? 32 : 16));
  p.v_words = Pairs ? p.v_padded / 2 : p.v_padded;
  p.v_depth = Pairs ? (a.v_head_size + 1) / 2 : a.v_head_size;
  p.v_columns = static_cast<int>(round_up(a.v_head_size, 16));
  p.group = a.q_heads / a.k_heads;
  p.dq_rows = round_up(a.longest_q, kPanel);
  p.dq_floats = p.group * p.dq_rows * p.padded;
  p.turns_b = a.dbias && a.dbias_in_order && !a.dbias_all_batches ? a.batches : 1;
  p.turns_h = a.dbias && a.dbias_in_order && !a.dbias_all_heads ? a.k_heads : 1;
  p.own_b = a.batches / p.turns_b;
  p.own_h = a.k_heads / p.turns_h;
  const bool sums_rows = a.dbias && a.dbias_stride[3] == 0;  // over all keys: not to be cut
  p.segments = a.longest_k > kSegmentKeys ? kSegments : 1;
  p.pieces = p.own_b * p.own_h < 8 && !sums_rows ? p.segments : 1;
  return p;
}

struct Scratch {
  Word *k, *k_turned, *k_pairs, *v, *v_turned, *q, *q_pairs, *dout, *dout_pairs, *p_pairs, *ds_pairs, *ds_rows;
  float *p, *ds, *slope, *dk, *dv, *delta, *dq, *dq_sum;
  uint16_t* bits;
};
Scratch scratch_of(Pool& pool, const Attention& a, const Plan& p, bool pairs) {
  Scratch w = {};
  w.k = pool.take<Word>(kKeys * p.words);
  w.k_turned = pool.take<Word>(kKeys * p.words);
  w.v = pool.take<Word>(kKeys * p.v_words);
  w.v_turned = pool.take<Word>(kKeys * p.v_words);
  w.q = pool.take<Word>(kRows * p.words);
  w.dout = pool.take<Word>(kRows * p.v_words);
  if (pairs) {
    w.k_pairs = pool.take<Word>(kKeys * p.words);
    w.q_pairs = pool.take<Word>(kRows * p.words);
    w.dout_pairs = pool.take<Word>(kRows * p.v_words);
    w.p_pairs = pool.take<Word>(kRows / 2 * kScoreRow);
    w.ds_pairs = pool.take<Word>(kRows / 2 * kScoreRow);
    w.ds_rows = pool.take<Word>(kRows * kScoreRow / 2);
  }
  w.p = pool.take<float>(kRows * kScoreRow);
  w.ds = pool.take<float>(kRows * kScoreRow);
  if (a.softcap > 0.0f) w.slope = pool.take<float>(kRows * kScoreRow);
  w.dk = pool.take<float>(kKeys * p.padded);
  w.dv = pool.take<float>(kKeys * p.v_padded);
  w.delta = pool.take<float>(p.group * p.dq_rows);
  w.bits = pool.take<uint16_t>(kRows * kChunks);
  if (p.pieces == 1) {
    w.dq_sum = pool.take<float>(p.dq_floats);
    w.dq = p.segments > 1 ? pool.take<float>(p.dq_floats) : w.dq_sum;
  }
  return w;
}

// delta of all rows of a head; what they give to its sink, if `dsink` is not null
void deltas(const Attention& a, const Sequence& s, int64_t head, float* delta, float* dsink) {
  const int n = static_cast<int>(a.v_head_size);
  const float *lse = a.lse + lse_place(a, s, head), *rest = a.rest + lse_place(a, s, head);
  const double sink = a.sinks ? a.sinks[head] : -kInfinity;
  double pull = 0.0;
  for (int64_t i = 0; i < s.rows; ++i) {
    const char* x = place(a.dout, s.batch, head, s.q_start + i);
    const char* y = place(a.out, s.batch, head, s.q_start + i);
    Vec part = zero();
    for (int c = 0; c < n; c += 16) {
      part = fma(load_strided(x + c * a.dout.s[3] * size_of(a.dout.dtype), a.dout.dtype, a.dout.s[3], n - c),
                 load_strided(y + c * a.out.s[3] * size_of(a.out.dtype), a.out.dtype, a.out.s[3], n - c), part);
    }
    delta[i] = total(part);
    if (a.dlse) delta[i] -= a.dlse[lse_place(a, s, head) + i];
    if (lse[i] == -kInfinity) delta[i] = 0.0f;
    if (dsink && lse[i] != -kInfinity) pull -= exp(sink - lse[i] - rest[i]) * delta[i];
  }
  if (dsink) *dsink = static_cast<float>(pull);
}

// One row of a tile: scores become kept probabilities, dout v^T becomes ds.
FASTLM_INLINE void differentiate(const Seen& seen, int from, int to, Factor natural, float lse, float rest, float delta,
                                 const uint16_t* keep, float keep_scale, const float* slope, float* dbias,
                                 int64_t dbias_stride, int keys, float* p, float* ds) {
  const Vec kept = set1(keep_scale), minus = set1(delta), lowest = set1(-__FLT_MAX__);
  const Vec shift = set1(lse == -kInfinity ? -kInfinity : -lse), less_rest = set1(rest);
  const Factor log2 = Factor::of(kLog2e);
  Vec row_sum = zero();
  for (int c = from; c < to; c += 16) {
    const Vec given = load(p + c), score = maximum(lowest, given);  // -inf times 0 would be NaN; a NaN stays one
    Vec x = exp_of(minimum(zero(), exponent(score, natural, shift) - less_rest), log2);
    x = select(less(given, lowest), zero(), x);  // hidden by -inf, in a row that may see nothing but the lowest scores
    if (!seen.all) x = select(seen.bits[c / 16], x, zero());
    Vec g = load(ds + c), stays = x;
    if (keep) {
      g = select(keep[c / 16], g * kept, zero());
      stays = select(keep[c / 16], x, zero());
    }
    Vec d = x * (g - minus);
    if (dbias) {
      const int n = keys - c < 16 ? keys - c : 16;
      if (dbias_stride == 0) {
        row_sum = row_sum + d;
      } else if (n == 16) {
        store(dbias + c, load(dbias + c) + d);
      } else {
        F32::store_part(dbias + c, F32::load_part(dbias + c, n) + d, n);
      }
    }
    if (slope) d = d * load(slope + c);
    store(p + c, stays);
    store(ds + c, d);
  }
  if (dbias && dbias_stride == 0) *dbias += total(row_sum);
}

// Two rows of float32 as pairs along the rows, and (if not null) each as bfloat16.
FASTLM_INLINE void narrow_rows(const float* x, const float* y, int from, int to, Word* pairs, Word* row_x,
                               Word* row_y) {
#if FASTLM_ISA_avx512
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int c = from; c < to; c += 16) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(load(y + c).v, load(x + c).v);
    _mm512_storeu_si512(pairs + c, _mm512_permutexvar_epi16(order, both));
    if (row_x) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_x + c / 2), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row_y + c / 2), _mm512_extracti64x4_epi64(both, 1));
    }
  }
#else
  (void)x, (void)y, (void)from, (void)to, (void)pairs, (void)row_x, (void)row_y;
#endif
}

void clear(float* p, int from, int to) {
  if (from < to) memset(p + from, 0, sizeof(float) * static_cast<size_t>(to - from));
}

// Rows row0 ... of one query head against the packed tile of keys.
template <bool Pairs>
void backward_tile(const Attention& a, const Plan& p, const Scratch& w, const Sequence& s, int64_t head, Tile& t,
                   Dropout& dropout, const float* delta, float* dq) {
  if (!look(a, s, t, w.bits)) return;
  const int n = static_cast<int>(a.head_size), panels = (t.rows + kPanel - 1) / kPanel, rows_padded = panels * kPanel;
  const bool shape_needed = shaped(a);
  const Factor natural = Factor::of(shape_needed ? 1.0 : a.scale);
  pack_rows<Pairs>(w.q, p.words, place(a.q, s.batch, head, s.q_start + t.row0), a.q.dtype, a.q.s[2], a.q.s[3], t.rows,
                   rows_padded, n);
  pack_rows<Pairs>(w.dout, p.v_words, place(a.dout, s.batch, head, s.q_start + t.row0), a.dout.dtype, a.dout.s[2],
                   a.dout.s[3], t.rows, rows_padded, static_cast<int>(a.v_head_size));
  if (Pairs) {
    pack_pairs(w.q_pairs, w.q, p.words, p.words, rows_padded);
    pack_pairs(w.dout_pairs, w.dout, p.v_words, p.v_words, rows_padded);
  }
  const bool dots = scores_by_dots(a);
  if (dots) dot<Pairs>(t.rows, p.words, w.q, p.words, w.k, p.words, round_up(t.keys, 16), w.p, kScoreRow);
  for (int column = t.low / kColumns * kColumns; column < t.high; column += kColumns) {
    for (int side = dots; side < 2; ++side) {
      const int words = side ? p.v_words : p.words;
      const Word* left = side ? w.dout : w.q;
      const Word* right = (side ? w.v_turned : w.k_turned) + static_cast<int64_t>(column) * words;
      float* result = side ? w.ds : w.p;
      for (int panel = 0; panel < panels; ++panel) {
        const int from = t.from[panel] > column ? t.from[panel] : column;
        const int to = t.to[panel] < column + kColumns ? t.to[panel] : column + kColumns;
        if (from >= to) continue;
        multiply<Pairs>(kPanel, to - from, side ? p.v_depth : p.depth,
                        left + static_cast<int64_t>(panel) * kPanel * words, words, 1, right + (from - column),
                        kColumns, result + panel * kPanel * kScoreRow + from, kScoreRow, false);
      }
    }
  }
  const int64_t first_row = lse_place(a, s, head) + t.row0;
  // A bias shared by all rows: eight rows are summed by themselves first, then the tile's, which keeps a long sum
  // exact.
  constexpr int kBiasRows = 8;
  float few_bias[kKeys] = {}, tile_bias[kKeys] = {};
  const bool shared_by_rows = a.dbias && a.dbias_stride[2] == 0 && a.dbias_stride[3] != 0;
  for (int row = 0; row < rows_padded; ++row) {
    const int from = t.from[row / kPanel], to = t.to[row / kPanel];
    float *scores = w.p + row * kScoreRow, *ds = w.ds + row * kScoreRow;
    if (row >= t.rows) {
      clear(scores, t.low, t.high);
      clear(ds, t.low, t.high);
    } else if (from < to) {
      float* slope = w.slope ? w.slope + row * kScoreRow : nullptr;
      if (shape_needed) shape(a, s, head, t.row0 + row, t, from, to, scores, slope);
      uint16_t keep[kChunks];
      if (a.threshold) dropout.row(head, t.row0 + row, t.key0, keep);
      float* dbias = nullptr;
      if (shared_by_rows) {
        dbias = few_bias;
      } else if (a.dbias) {
        dbias = a.dbias + s.batch * a.dbias_stride[0] + head * a.dbias_stride[1] + (t.row0 + row) * a.dbias_stride[2] +
                t.key0 * a.dbias_stride[3];
      }
      differentiate(Seen::of(s, t, row, t.row0 + row, from, to), from, to, natural, a.lse[first_row + row],
                    a.rest[first_row + row], delta[t.row0 + row], a.threshold ? keep : nullptr, a.keep_scale, slope,
                    dbias, a.dbias_stride[3], t.keys, scores, ds);
    }
    if (shared_by_rows && row % kBiasRows == kBiasRows - 1) {
      for (int c = t.low; c < t.high; ++c) tile_bias[c] += few_bias[c], few_bias[c] = 0.0f;
    }
    if (from >= to) {
      clear(scores, t.low, t.high);
      clear(ds, t.low, t.high);
    } else {
      clear(scores, t.low, from);
      clear(scores, to, t.high);
      clear(ds, t.low, from);
      clear(ds, to, t.high);
    }
    if (Pairs && row % 2) {
      narrow_rows(scores - kScoreRow, scores, t.low, t.high, w.p_pairs + row / 2 * kScoreRow, nullptr, nullptr);
      Word* ds_row = w.ds_rows + row * (kScoreRow / 2);
      narrow_rows(ds - kScoreRow, ds, t.low, t.high, w.ds_pairs + row / 2 * kScoreRow, ds_row - kScoreRow / 2, ds_row);
    }
  }
  if (shared_by_rows) {
    for (int c = t.low; c < t.high; ++c) tile_bias[c] += few_bias[c];
    float* dbias = a.dbias + s.batch * a.dbias_stride[0] + head * a.dbias_stride[1] + t.key0 * a.dbias_stride[3];
    for (int c = t.low; c < t.high && c < t.keys; ++c) dbias[c] += tile_bias[c];
  }
  int first[kChunks], last[kChunks];  // the panels of rows that see a chunk of keys
  for (int c = t.low / 16; c < t.high / 16; ++c) {
    first[c] = panels;
    last[c] = 0;
    for (int panel = 0; panel < panels; ++panel) {
      if (t.from[panel] > 16 * c || t.to[panel] <= 16 * c) continue;
      if (first[c] == panels) first[c] = panel;
      last[c] = panel + 1;
    }
  }
  for (int column = 0; column < (p.columns > p.v_columns ? p.columns : p.v_columns); column += kColumns) {
    for (int side = 0; side < 2; ++side) {
      const int columns = side ? p.columns : p.v_columns, padded = side ? p.padded : p.v_padded;
      const int wide = columns - column < kColumns ? columns - column : kColumns;
      if (wide <= 0) continue;
      const float* left = side ? w.ds : w.p;
      const Word* left_pairs = side ? w.ds_pairs : w.p_pairs;
      const Word* right = (Pairs ? (side ? w.q_pairs : w.dout_pairs) : (side ? w.q : w.dout)) + column;
      float* result = (side ? w.dk : w.dv) + column;
      for (int key = t.low; key < t.high; key += kPanel) {
        const int begin = first[key / 16] * kPanel, count = last[key / 16] * kPanel - begin;
        if (count <= 0) continue;
        if (Pairs) {
          multiply<Pairs>(kPanel, wide, count / 2, left_pairs + begin / 2 * kScoreRow + key, 1, kScoreRow,
                          right + static_cast<int64_t>(begin / 2) * padded, padded,
                          result + static_cast<int64_t>(key) * padded, padded, true);
        } else {
          multiply<Pairs>(kPanel, wide, count, reinterpret_cast<const Word*>(left) + begin * kScoreRow + key, 1,
                          kScoreRow, right + static_cast<int64_t>(begin) * padded, padded,
                          result + static_cast<int64_t>(key) * padded, padded, true);
        }
      }
    }
    const int wide = p.columns - column < kColumns ? p.columns - column : kColumns;
    for (int panel = 0; panel < panels && wide > 0; ++panel) {
      const int from = t.from[panel], to = t.to[panel];
      if (from >= to) continue;
      float* c = dq + (t.row0 + panel * kPanel) * p.padded + column;
      if (Pairs) {
        multiply<Pairs>(kPanel, wide, (to - from) / 2, w.ds_rows + (panel * kPanel * kScoreRow + from) / 2,
                        kScoreRow / 2, 1, w.k_pairs + static_cast<int64_t>(from / 2) * p.padded + column, p.padded, c,
                        p.padded, true);
      } else {
        multiply<Pairs>(kPanel, wide, to - from, reinterpret_cast<Word*>(w.ds) + panel * kPanel * kScoreRow + from,
                        kScoreRow, 1, w.k + static_cast<int64_t>(from) * p.padded + column, p.padded, c, p.padded,
                        true);
      }
    }
  }
}

struct Range {
  int64_t begin, end;
};
FASTLM_INLINE Range segment_of(const Sequence& s, int number) {
  const int64_t keys = most(kSegmentKeys, round_up((s.keys + kSegments - 1) / kSegments, kKeys));
  return {least(number * keys, s.keys), least((number + 1) * keys, s.keys)};
}
// The rows that see any of these keys.
FASTLM_INLINE Range rows_of(const Sequence& s, int64_t key_begin, int64_t key_end) {
  key_end = least(key_end, s.valid);
  Range r = {s.right < 0 ? 0 : most(0, key_begin - s.base - s.right),
             s.left < 0 ? s.rows : least(s.rows, key_end - s.base + s.left)};
  if (key_begin >= key_end || r.begin >= r.end) r = {0, 0};
  return r;
}

// The keys of one segment of one head of k: dk and dv in full, and what they give to dq [group, dq_rows, padded], in
// the rows that see them.
template <bool Pairs>
void backward_item(const Attention& a, const Plan& p, const Scratch& w, const Sequence& s, int64_t kv_head, Range keys,
                   float* dq) {
  const int n = static_cast<int>(a.head_size), v_n = static_cast<int>(a.v_head_size);
  const Range seen = rows_of(s, keys.begin, keys.end);
  for (int64_t g = 0; g < p.group && seen.begin < seen.end; ++g) {
    const int64_t begin = seen.begin / kPanel * kPanel, end = round_up(seen.end, kPanel);
    memset(dq + (g * p.dq_rows + begin) * p.padded, 0, sizeof(float) * static_cast<size_t>(end - begin) * p.padded);
  }
  for (int64_t key0 = keys.begin; key0 < keys.end; key0 += kKeys) {
    const int stored = static_cast<int>(least(kKeys, keys.end - key0));
    Tile t;
    t.key0 = key0;
    t.keys = static_cast<int>(least(stored, s.valid - key0));
    memset(w.dk, 0, sizeof(float) * kKeys * p.padded);
    memset(w.dv, 0, sizeof(float) * kKeys * p.v_padded);
    const Range rows = rows_of(s, key0, key0 + stored);
    if (rows.begin < rows.end) {
      const int64_t keys16 = round_up(t.keys, 16);
      pack_rows<Pairs>(w.k, p.words, place(a.k, s.batch, kv_head, s.k_start + key0), a.k.dtype, a.k.s[2], a.k.s[3],
                       t.keys, keys16, n);
      pack_rows<Pairs>(w.v, p.v_words, place(a.v, s.batch, kv_head, s.k_start + key0), a.v.dtype, a.v.s[2], a.v.s[3],
                       t.keys, keys16, v_n);
      pack_turned(w.k_turned, w.k, p.words, p.words, keys16);
      pack_turned(w.v_turned, w.v, p.v_words, p.v_words, keys16);
      if (Pairs) pack_pairs(w.k_pairs, w.k, p.words, p.words, keys16);
      for (int64_t g = 0; g < p.group; ++g) {
        const int64_t head = kv_head * p.group + g;
        Dropout dropout = Dropout::of(a, s);
        for (int64_t row0 = rows.begin / kRows * kRows; row0 < rows.end; row0 += kRows) {
          t.row0 = row0;
          t.rows = t.queries = static_cast<int>(least(kRows, s.rows - row0));
          t.head = head;
          backward_tile<Pairs>(a, p, w, s, head, t, dropout, w.delta + g * p.dq_rows, dq + g * p.dq_rows * p.padded);
        }
      }
    }
    for (int j = 0; j < stored; ++j) {
      store_row(place(a.dk, s.batch, kv_head, s.k_start + key0 + j), a.dk.dtype, a.dk.s[3], w.dk + j * p.padded,
                static_cast<float>(a.scale), n);
      store_row(place(a.dv, s.batch, kv_head, s.k_start + key0 + j), a.dv.dtype, a.dv.s[3], w.dv + j * p.v_padded,
                a.keep_scale, v_n);
    }
  }
}

// Adds what one segment gave to dq of one query head.
void add_segment(const Plan& p, Range seen, const float* from, float* dq) {
  for (int64_t i = seen.begin * p.padded; i < seen.end * p.padded; i += 16) {
    store(dq + i, load(dq + i) + load(from + i));
  }
}

void finish_dq(const Attention& a, const Plan& p, const Sequence& s, int64_t head, const float* dq) {
  for (int64_t i = 0; i < s.rows; ++i) {
    store_row(place(a.dq, s.batch, head, s.q_start + i), a.dq.dtype, a.dq.s[3], dq + i * p.padded,
              static_cast<float>(a.scale), static_cast<int>(a.head_size));
  }
}

template <bool Pairs>
bool backward(const Attention& a) {
  const Plan p = plan_of<Pairs>(a);
  Pool measure = {nullptr};
  scratch_of(measure, a, p, Pairs);
  const int64_t bytes = round_up(reinterpret_cast<int64_t>(measure.at), 4096) + 64;
  const int64_t own = p.own_b * p.own_h, items = own * p.pieces;
  const int threads = static_cast<int>(least(a.threads, most(items, 1)));
  const int64_t shared = p.pieces > 1 ? (items + own) * p.dq_floats * static_cast<int64_t>(sizeof(float)) : 0;
  char* memory = static_cast<char*>(aligned_alloc(64, static_cast<size_t>(round_up(bytes * threads + shared, 64))));
  if (!memory) return false;
  float* pieces = reinterpret_cast<float*>(memory + bytes * threads);
  float* sums = pieces + items * p.dq_floats;
  for (int64_t turn = 0; turn < p.turns_b * p.turns_h; ++turn) {
    const auto run = [&](int64_t item, int thread, bool joining) {
      const int64_t piece = joining ? 0 : item % p.pieces, rest = joining ? item / p.group : item / p.pieces;
      const int64_t batch = p.turns_b > 1 ? turn / p.turns_h : rest / p.own_h;
      const int64_t kv_head = p.turns_h > 1 ? turn % p.turns_h : rest % p.own_h;
      const Sequence s = sequence_of(a, batch);
      Pool pool = {memory + bytes * thread};
      const Scratch w = scratch_of(pool, a, p, Pairs);
      const size_t dq_bytes = sizeof(float) * static_cast<size_t>(s.rows) * p.padded;
      if (joining) {
        const int64_t g = item % p.group;
        float* dq = sums + item * p.dq_rows * p.padded;
        memset(dq, 0, dq_bytes);
        for (int i = 0; i < p.pieces; ++i) {
          const Range keys = segment_of(s, i);
          add_segment(p, rows_of(s, keys.begin, keys.end),
                      pieces + (rest * p.pieces + i) * p.dq_floats + g * p.dq_rows * p.padded, dq);
        }
        finish_dq(a, p, s, kv_head * p.group + g, dq);
        return;
      }
      for (int64_t g = 0; g < p.group; ++g) {
        const int64_t head = kv_head * p.group + g;
        float* dsink = a.dsinks && piece == 0 ? a.dsinks + batch * a.q_heads + head : nullptr;
        deltas(a, s, head, w.delta + g * p.dq_rows, dsink);
      }
      if (p.pieces > 1) {
        backward_item<Pairs>(a, p, w, s, kv_head, segment_of(s, static_cast<int>(piece)), pieces + item * p.dq_floats);
        return;
      }
      for (int64_t g = 0; g < p.group; ++g) memset(w.dq_sum + g * p.dq_rows * p.padded, 0, dq_bytes);
      for (int i = 0; i < p.segments; ++i) {
        const Range keys = segment_of(s, i), seen = rows_of(s, keys.begin, keys.end);
        backward_item<Pairs>(a, p, w, s, kv_head, keys, w.dq);
        for (int64_t g = 0; g < p.group && p.segments > 1; ++g) {
          add_segment(p, seen, w.dq + g * p.dq_rows * p.padded, w.dq_sum + g * p.dq_rows * p.padded);
        }
      }
      for (int64_t g = 0; g < p.group; ++g) {
        finish_dq(a, p, s, kv_head * p.group + g, w.dq_sum + g * p.dq_rows * p.padded);
      }
    };
    for (int joining = 0; joining < (p.pieces > 1 ? 2 : 1); ++joining) {
      const int64_t count = joining ? own * p.group : items;
      if (threads == 1) {
        for (int64_t item = 0; item < count; ++item) run(item, 0, joining);
      } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t item = 0; item < count; ++item) run(item, thread_number(), joining);
      }
    }
  }
  free(memory);
  return true;
}

}  // namespace

bool attention_backward(const Attention& a) {
  if (kHasPairs && a.q.dtype == kBFloat16) return backward<kHasPairs>(a);
  return backward<false>(a);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
