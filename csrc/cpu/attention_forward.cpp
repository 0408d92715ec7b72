// Attention, forward: out = softmax(shape(q k^T)) v and lse, in tiles of up to 256 rows by 128 keys.
//
// An item of work is a block of rows of one head and walks over the keys, keeping per row the largest score so far, the
// sum of exponentials relative to it, and the unnormalised output. Two products of rows x keys x head size; exp, max
// and sum are about fifteen instructions for sixteen scores. Where K and V do not lie as the products want them, they
// are packed tile by tile into the thread's scratch, which costs 1/rows of the products.
//
// Few queries against many keys (generation): the queries of heads that share a head of k and v stand in one block, so
// a cache is read once, and its keys are cut into pieces of a fixed size, joined in order. Then the time is that of
// reading 2 x keys x head size.
#include <stdlib.h>

#include "cpu/attention_tile.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kPieceKeys = 512;   // of a piece of the keys,
constexpr int kMostPieces = 256;  // unless they were more than these

struct Plan {
  int rows, pieces, stack;  // rows of a block; pieces of the keys; heads of a block
  bool dots;
  int64_t blocks, queries, piece_keys;
  int words, v_words;  // words of a packed row of Q and K, of V
  int columns;         // of the output (a multiple of 16)
  int64_t depth;       // words that are summed for a score
  int padded;          // floats of a row of the output, and of V as the right factor
};

template <bool Pairs>
Plan plan_of(const Attention& a) {
  Plan p;
  p.padded = static_cast<int>(round_up(a.v_head_size, Pairs ? 32 : 16));
  p.words = static_cast<int>(Pairs ? round_up(a.head_size, 32) / 2 : round_up(a.head_size, 16));
  p.v_words = Pairs ? p.padded / 2 : p.padded;
  p.depth = Pairs ? (a.head_size + 1) / 2 : a.head_size;
  p.columns = static_cast<int>(round_up(a.v_head_size, 16));
  const int64_t heads = a.batches * a.q_heads;
  p.stack = stacked_heads(a);
  const int64_t widest = most(a.head_size, a.v_head_size);
  p.rows = widest > 256 ? 64 : widest > 128 ? 128 : 256;
  while (p.rows > 64 && heads * ((a.longest_q + p.rows - 1) / p.rows) < 16) p.rows /= 2;
  p.rows = static_cast<int>(least(p.rows, round_up(most(p.stack * a.longest_q, 1), kPanel)));
  p.queries = p.stack > 1 ? a.longest_q : p.rows;
  p.blocks = (a.longest_q + p.queries - 1) / p.queries;
  p.dots = scores_by_dots(a);
  p.pieces = 1;
  p.piece_keys = most(a.longest_k, 1);
  if (p.stack * a.longest_q <= kFewRows) {
    p.piece_keys = most(kPieceKeys, round_up((a.longest_k + kMostPieces - 1) / kMostPieces, kKeys));
    p.pieces = static_cast<int>(most(1, (a.longest_k + p.piece_keys - 1) / p.piece_keys));
  }
  return p;
}

struct Scratch {
  Word *q, *k, *k_turned, *v, *v_pairs, *p_pairs;
  float *scores, *out, *top, *sum;
  uint16_t* bits;
};
Scratch scratch_of(Pool& pool, const Plan& p, bool pairs) {
  Scratch w;
  w.q = pool.take<Word>(static_cast<int64_t>(p.rows) * p.words);
  w.k = pool.take<Word>(kKeys * p.words);
  w.k_turned = pool.take<Word>(kKeys * p.words);
  w.v = pool.take<Word>(kKeys * p.v_words);
  w.v_pairs = pool.take<Word>(pairs ? kKeys * p.v_words : 0);
  w.p_pairs = pool.take<Word>(pairs ? static_cast<int64_t>(p.rows) * kScoreRow / 2 : 0);
  w.scores = pool.take<float>(static_cast<int64_t>(p.rows) * kScoreRow);
  w.out = pool.take<float>(static_cast<int64_t>(p.rows) * p.padded);
  w.top = pool.take<float>(p.rows);
  w.sum = pool.take<float>(p.rows);
  w.bits = pool.take<uint16_t>(static_cast<int64_t>(p.rows) * kChunks);
  return w;
}

// What a piece of the keys leaves for a block of rows: its output, then largest score and sum of each row.
int64_t part_floats(const Plan& p) { return static_cast<int64_t>(p.rows) * (p.padded + 2); }

// The exponentials of one row of scores, written to P; updates top, sum and the row of the output.
template <bool Pairs>
FASTLM_INLINE void soften(const Seen& seen, int from, int to, Factor log2, const uint16_t* keep, float* scores,
                          Word* pairs, float& top, float& sum, float* out, int columns) {
  Vec high = set1(-kInfinity);
  if (seen.all) {
    for (int c = from; c < to; c += 16) high = maximum(high, load(scores + c));
  } else {
    for (int c = from; c < to; c += 16) {
      high = maximum_where(seen.bits[c / 16], high, load(scores + c));
    }
  }
  const float before = top, now = largest(high) > before ? largest(high) : before;
  if (now > before) {
    top = now;
    if (before > -kInfinity) {
      const float shrink = first_lane(exp_of(set1(before - now), log2));
      const Vec f = set1(shrink);
      sum *= shrink;
      for (int c = 0; c < columns; c += 16) store(out + c, load(out + c) * f);
    }
  }
  const Vec reference = set1(now > -kInfinity ? now : 0.0f);
  Vec part = zero();
  for (int c = from; c < to; c += 16) {
    Vec x = exp_of(load(scores + c) - reference, log2);
    if (!seen.all) x = select(seen.bits[c / 16], x, zero());
    part = part + x;
    if (keep) x = select(keep[c / 16], x, zero());
    if (Pairs) {
      store_bf16(reinterpret_cast<char*>(pairs) + 2 * c, x);
    } else {
      store(scores + c, x);
    }
  }
  sum += total(part);
}

// A row's output, lse and rest from its largest score (in units of 1 / natural) and the sum of exponentials relative to
// it; here the sink joins. A row that sees a NaN has a sum that is NaN. rest is what the backward, which takes lse off
// the score as `exponent` does, must take off as well, so that the largest score has the probability 1 / sum.
FASTLM_INLINE void finish(const Attention& a, const Sequence& s, Query q, const float* out, float top, double natural,
                          float sum) {
  const bool none = sum == 0.0f;
  const double high = top * natural;
  double total = none ? -kInfinity : high + log(static_cast<double>(sum));
  double more = log(static_cast<double>(sum));  // of all exponentials, relative to the largest
  bool sink_is_largest = false;
  float factor = none ? 0.0f : a.keep_scale / sum;
  if (a.sinks && !(a.sinks[q.head] == -kInfinity)) {
    const double sink = a.sinks[q.head];
    sink_is_largest = none || sink > high;
    const double reference = sink_is_largest ? sink : high;
    const double share = none ? 0.0 : exp(high - reference), all = share * sum + exp(sink - reference);
    more = log(all);
    total = reference + more;
    factor = static_cast<float>(a.keep_scale * share / all);
  }
  const float lse = static_cast<float>(total);
  store_row(place(a.out, s.batch, q.head, s.q_start + q.i), a.out.dtype, a.out.s[3], out, factor,
            static_cast<int>(a.v_head_size));
  const int64_t at = lse_place(a, s, q.head) + q.i;
  const float above =
      sink_is_largest ? a.sinks[q.head] - lse : first_lane(exponent(set1(top), Factor::of(natural), set1(-lse)));
  const float rest = static_cast<float>(above + more);
  a.lse[at] = lse;
  a.rest[at] = rest - rest == 0.0f ? rest : 0.0f;  // of what is no finite number nothing is left
}

// Rows row0 ... of heads head ... against keys [key_begin, key_end); the result, or `part` of it.
template <bool Pairs>
void forward_item(const Attention& a, const Plan& p, const Scratch& w, const Sequence& s, int64_t head, int64_t row0,
                  int64_t key_begin, int64_t key_end, float* part) {
  Tile t;
  t.head = head;
  t.row0 = row0;
  t.queries = static_cast<int>(least(p.queries, s.rows - row0));
  t.rows = t.queries * p.stack;
  const int rows = t.rows, panels = (rows + kPanel - 1) / kPanel, rows_padded = panels * kPanel;
  const int64_t kv_head = head / (a.q_heads / a.k_heads);
  const bool shape_needed = shaped(a);
  const double natural = shape_needed ? 1.0 : a.scale;  // of a score
  const Factor log2 = Factor::of(natural * kLog2e);
  Dropout dropout = Dropout::of(a, s);
  for (int r = 0; r < rows_padded; ++r) {
    w.top[r] = -kInfinity;
    w.sum[r] = 0.0f;
  }
  memset(w.out, 0, sizeof(float) * static_cast<size_t>(rows_padded) * p.padded);
  const int n = static_cast<int>(a.head_size);
  bool packed_q = false;
  key_begin = most(key_begin, first_key(s, row0) / kKeys * kKeys);
  key_end = least(key_end, last_key(s, row0 + t.queries - 1));
  for (int64_t key0 = key_begin; key0 < key_end; key0 += kKeys) {
    t.key0 = key0;
    t.keys = static_cast<int>(least(kKeys, s.valid - key0));
    if (!look(a, s, t, w.bits)) continue;
    if (!packed_q) {
      for (int g = 0; g < p.stack; ++g) {
        pack_rows<Pairs>(w.q + g * t.queries * p.words, p.words, place(a.q, s.batch, head + g, s.q_start + row0),
                         a.q.dtype, a.q.s[2], a.q.s[3], t.queries, t.queries, n);
      }
      packed_q = true;
    }
    const int64_t keys16 = round_up(t.keys, 16);
    const Rows k =
        Rows::of<Pairs>(a.k, place(a.k, s.batch, kv_head, s.k_start + key0), t.keys, keys16, p.words, n, w.k);
    if (!p.dots) pack_turned(w.k_turned, k.p, k.step, p.words, keys16);
    Rows v = Rows::of<Pairs>(a.v, place(a.v, s.batch, kv_head, s.k_start + key0), t.keys, keys16, p.v_words,
                             static_cast<int>(a.v_head_size), w.v);
    if (Pairs) {
      pack_pairs(w.v_pairs, v.p, v.step, p.v_words, keys16);
    } else if (v.step != p.v_words && rows > 16) {  // rows far apart fall on few cache sets: worth a copy if read often
      for (int64_t r = 0; r < keys16; ++r) memcpy(w.v + r * p.v_words, v.p + r * v.step, sizeof(Word) * p.v_words);
      v = {w.v, p.v_words};
    }

    if (p.dots) dot<Pairs>(rows, p.words, w.q, p.words, k.p, k.step, keys16, w.scores, kScoreRow);
    for (int column = t.low / kColumns * kColumns; column < t.high && !p.dots; column += kColumns) {
      const Word* b = w.k_turned + static_cast<int64_t>(column) * p.words;
      for (int panel = 0; panel < panels; ++panel) {
        const int from = t.from[panel] > column ? t.from[panel] : column;
        const int to = t.to[panel] < column + kColumns ? t.to[panel] : column + kColumns;
        if (from >= to) continue;
        multiply<Pairs>(rows - panel * kPanel, to - from, p.depth, w.q + static_cast<int64_t>(panel) * kPanel * p.words,
                        p.words, 1, b + (from - column), kColumns, w.scores + panel * kPanel * kScoreRow + from,
                        kScoreRow, false);
      }
    }
    for (int row = 0; row < rows; ++row) {
      const int from = t.from[row / kPanel], to = t.to[row / kPanel];
      float* scores = w.scores + row * kScoreRow;
      Word* pairs = w.p_pairs + row * (kScoreRow / 2);
      if (from >= to) continue;
      const Query query = query_of(t, row);
      if (shape_needed) shape(a, s, query.head, query.i, t, from, to, scores, nullptr);
      uint16_t keep[kChunks];
      if (a.threshold) dropout.row(query.head, query.i, key0, keep);
      soften<Pairs>(Seen::of(s, t, row, query.i, from, to), from, to, log2, a.threshold ? keep : nullptr, scores, pairs,
                    w.top[row], w.sum[row], w.out + static_cast<int64_t>(row) * p.padded, p.columns);
    }
    for (int column = 0; column < p.columns; column += kColumns) {
      const int wide = p.columns - column < kColumns ? p.columns - column : kColumns;
      for (int panel = 0; panel < panels; ++panel) {
        const int from = t.from[panel], to = t.to[panel];
        if (from >= to) continue;
        float* c = w.out + static_cast<int64_t>(panel) * kPanel * p.padded + column;
        if (Pairs) {
          multiply<Pairs>(rows - panel * kPanel, wide, (to - from) / 2,
                          w.p_pairs + (panel * kPanel * kScoreRow + from) / 2, kScoreRow / 2, 1,
                          w.v_pairs + static_cast<int64_t>(from / 2) * p.padded + column, p.padded, c, p.padded, true);
        } else {
          multiply<Pairs>(rows - panel * kPanel, wide, to - from,
                          reinterpret_cast<Word*>(w.scores) + panel * kPanel * kScoreRow + from, kScoreRow, 1,
                          v.p + from * v.step + column, v.step, c, p.padded, true);
        }
      }
    }
  }
  if (part) {
    memcpy(part, w.out, sizeof(float) * static_cast<size_t>(rows) * p.padded);
    float* ends = part + static_cast<int64_t>(p.rows) * p.padded;
    for (int r = 0; r < rows; ++r) {
      ends[r] = w.top[r];
      ends[p.rows + r] = w.sum[r];
    }
    return;
  }
  for (int r = 0; r < rows; ++r) {
    finish(a, s, query_of(t, r), w.out + static_cast<int64_t>(r) * p.padded, w.top[r], natural, w.sum[r]);
  }
}

// Joins the pieces of a block of rows, in order.
void join(const Attention& a, const Plan& p, const Scratch& w, const Sequence& s, int64_t head, int64_t row0,
          const float* parts) {
  Tile t;
  t.head = head;
  t.row0 = row0;
  t.queries = static_cast<int>(least(p.queries, s.rows - row0));
  const int rows = t.queries * p.stack;
  const int64_t step = part_floats(p), ends = static_cast<int64_t>(p.rows) * p.padded;
  const double natural = shaped(a) ? 1.0 : a.scale;
  const Factor log2 = Factor::of(natural * kLog2e);
  for (int r = 0; r < rows; ++r) {
    float top = -kInfinity, sum = 0.0f;
    for (int i = 0; i < p.pieces; ++i) {
      const float t = parts[i * step + ends + r];
      if (t > top) top = t;
    }
    memset(w.out, 0, sizeof(float) * static_cast<size_t>(p.padded));
    const float reference = top > -kInfinity ? top : 0.0f;
    for (int i = 0; i < p.pieces; ++i) {
      const float weight = first_lane(exp_of(set1(parts[i * step + ends + r] - reference), log2));
      const float* row = parts + i * step + static_cast<int64_t>(r) * p.padded;
      sum += parts[i * step + ends + p.rows + r] * weight;
      for (int c = 0; c < p.columns; c += 16) store(w.out + c, fma(load(row + c), set1(weight), load(w.out + c)));
    }
    finish(a, s, query_of(t, r), w.out, top, natural, sum);
  }
}

template <bool Pairs>
bool forward(const Attention& a) {
  const Plan p = plan_of<Pairs>(a);
  Pool measure = {nullptr};
  scratch_of(measure, p, Pairs);
  const int64_t bytes = round_up(reinterpret_cast<int64_t>(measure.at), 4096) + 64;
  const int64_t stacks = a.q_heads / p.stack, heads = a.batches * stacks, items = heads * p.blocks * p.pieces;
  const int threads = static_cast<int>(least(a.threads, most(items, 1)));
  const int64_t parts = p.pieces > 1 ? items * part_floats(p) * static_cast<int64_t>(sizeof(float)) : 0;
  char* memory = static_cast<char*>(aligned_alloc(64, static_cast<size_t>(round_up(bytes * threads + parts, 64))));
  if (!memory) return false;
  float* part = reinterpret_cast<float*>(memory + bytes * threads);
  // The last rows first: with causality they take longest.
  const auto run = [&](int64_t item, int thread, bool joining) {
    Pool pool = {memory + bytes * thread};
    const Scratch w = scratch_of(pool, p, Pairs);
    const int64_t piece = joining ? 0 : item % p.pieces, rest = joining ? item : item / p.pieces;
    const int64_t head = rest % stacks * p.stack, batch = rest / stacks % a.batches;
    const int64_t row0 = (p.blocks - 1 - rest / heads) * p.queries;
    const Sequence s = sequence_of(a, batch);
    if (row0 >= s.rows) return;
    if (joining) {
      join(a, p, w, s, head, row0, part + rest * p.pieces * part_floats(p));
    } else {
      forward_item<Pairs>(a, p, w, s, head, row0, piece * p.piece_keys, (piece + 1) * p.piece_keys,
                          p.pieces > 1 ? part + item * part_floats(p) : nullptr);
    }
  };
  for (int joining = 0; joining < (p.pieces > 1 ? 2 : 1); ++joining) {
    const int64_t count = joining ? heads * p.blocks : items;
    if (threads == 1) {
      for (int64_t item = 0; item < count; ++item) run(item, 0, joining);
    } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
      for (int64_t item = 0; item < count; ++item) run(item, thread_number(), joining);
    }
  }
  free(memory);
  return true;
}

}  // namespace

bool attention_forward(const Attention& a) {
  if (kHasPairs && a.q.dtype == kBFloat16) return forward<kHasPairs>(a);
  return forward<false>(a);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
