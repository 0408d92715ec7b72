// Pruning masks on the CPU: the loops over a piece of a row, compiled once for each instruction set. What they are for,
// and the passes, are in entry_prune_mask.cpp. Only `sums` computes with floats; everything else compares integers, so
// neither flushed denormals nor rounding change a mask.
#include "cpu/prune_mask.h"

#include "cpu/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

using namespace prune_call;

FASTLM_INLINE int32_t key_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  const int32_t magnitude = bits & 0x7FFFFFFF;
  return bits < 0 ? -magnitude : magnitude;
}

template <class T>
void widen(const Row& row, int64_t begin, int64_t n, float* out) {
  typedef typename T::Element Element;
  const Element* x = reinterpret_cast<const Element*>(row.x) + begin * row.stride;
  if (row.stride == 1) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, T::load(x + i));
    if (i < n) F32::store_part(out + i, T::load_part(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const int part = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    Element lanes[kLanes] = {};
    for (int j = 0; j < part; ++j) lanes[j] = x[(i + j) * row.stride];
    F32::store_part(out + i, T::load(lanes), part);
  }
}

#if FASTLM_ISA_avx2 || FASTLM_ISA_avx512
#define FASTLM_EIGHT 1
typedef __m256i Keys;
FASTLM_INLINE Keys keys(const float* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i sign = _mm256_srai_epi32(bits, 31);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  return _mm256_sub_epi32(_mm256_xor_si256(magnitude, sign), sign);
}
FASTLM_INLINE int bits(__m256i mask) { return _mm256_movemask_ps(_mm256_castsi256_ps(mask)); }
FASTLM_INLINE __m256i ones() { return _mm256_set1_epi32(-1); }
#endif

FASTLM_INLINE void count_one(float x, int i, int32_t low, int32_t last, int shift, Histogram* h) {
  const int32_t key = key_of(x);
  if (key > kInf || key < -kInf) {
    ++h->nan;
  } else if (key < low) {
    ++h->below;
  } else if (key <= last) {
    ++h->bins[i & 1][(static_cast<uint32_t>(key) - static_cast<uint32_t>(low)) >> shift];
  }
}

FASTLM_INLINE int decide(int inside, const float* x, uint8_t* byte, Writer* w) {
  if (w->equal) {
    const int count = __builtin_popcount(static_cast<unsigned>(inside));
    if (w->ties >= count) {
      w->ties -= count;
      return 0;
    }
    while (w->ties > 0) {
      inside &= inside - 1;
      --w->ties;
    }
    return inside;
  }
  for (; inside; inside &= inside - 1) {
    const int i = __builtin_ctz(static_cast<unsigned>(inside));
    const Candidate c = {key_of(x[i]), static_cast<uint8_t>(1u << i), byte};
    w->candidates[w->found++] = c;
  }
  return 0;
}

FASTLM_INLINE int write_few(const float* x, int n, uint8_t* byte, Writer* w) {
  int above = 0, inside = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t key = key_of(x[i]);
    above |= (key > w->last) << i;
    inside |= (key >= w->low && key <= w->last) << i;
  }
  return inside ? above | decide(inside, x, byte, w) : above;
}

}  // namespace

// Scores [begin, begin + n) of a row as float32: where they lie, or in `buffer`.
const float* prune_fetch(const Row& row, int64_t begin, int64_t n, float* buffer) {
  if (row.dtype == 0 && row.stride == 1 && !row.magnitude) return reinterpret_cast<const float*>(row.x) + begin;
  if (row.dtype == 0) {
    widen<F32>(row, begin, n, buffer);
  } else if (row.dtype == 1) {
    widen<BF16>(row, begin, n, buffer);
  } else {
    widen<F16>(row, begin, n, buffer);
  }
  if (row.scale) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = __builtin_fabsf(buffer[i]) * row.scale[begin + i];
  } else if (row.magnitude) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = __builtin_fabsf(buffer[i]);
  }
  return buffer;
}

// NaN, keys below `low`, and those within [low, last] by bins of 2^shift keys.
void prune_count(const float* x, int64_t n, int32_t low, int32_t last, int shift, Histogram* h) {
  int64_t i = 0;
#if FASTLM_EIGHT
  const __m256i low8 = _mm256_set1_epi32(low), last8 = _mm256_set1_epi32(last);
  const __m128i by = _mm_cvtsi32_si128(shift);
  __m256i below = _mm256_setzero_si256(), nan = _mm256_setzero_si256();
  int32_t lanes[8];
  for (; i + 8 <= n; i += 8) {
    const __m256i key = keys(x + i);
    const __m256i under = _mm256_cmpgt_epi32(low8, key), over = _mm256_cmpgt_epi32(key, last8);
    below = _mm256_sub_epi32(below, under);
    nan = _mm256_max_epi32(nan, _mm256_abs_epi32(key));
    int inside = bits(_mm256_or_si256(under, over)) ^ 0xFF;
    if (!inside) continue;
    const __m256i bin = _mm256_srl_epi32(_mm256_sub_epi32(key, low8), by);
    if (inside == 0xFF) {
      const __m256i first = _mm256_permutevar8x32_epi32(bin, _mm256_setzero_si256());
      if (bits(_mm256_cmpeq_epi32(first, bin)) == 0xFF) {
        h->bins[0][_mm256_cvtsi256_si32(bin)] += 8;
        continue;
      }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), bin);
    for (; inside; inside &= inside - 1) {
      const int k = __builtin_ctz(static_cast<unsigned>(inside));
      ++h->bins[k & 1][lanes[k]];
    }
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_cmpgt_epi32(nan, _mm256_set1_epi32(kInf)));
  bool any = false;
  for (int k = 0; k < 8; ++k) any = any || lanes[k] != 0;
  if (any) {  // rare: NaN count among what is below or above, so the counts start again
    for (int64_t j = 0; j < n; ++j) h->nan += __builtin_isnan(x[j]);
    return;
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), below);
  for (int k = 0; k < 8; ++k) h->below += lanes[k];
#endif
  for (; i < n; ++i) count_one(x[i], static_cast<int>(i), low, last, shift, h);
}

// The mask of a piece: keys above `last` stay, those below `low` go, the rest as the writer decides.
void prune_write(const float* x, int64_t n, Writer* w, uint8_t* out) {
  int64_t i = 0;
#if FASTLM_EIGHT
  const __m256i low8 = _mm256_set1_epi32(w->low), last8 = _mm256_set1_epi32(w->last);
  for (; i + 8 <= n; i += 8) {
    const __m256i key = keys(x + i);
    int above = bits(_mm256_cmpgt_epi32(key, last8));
    const int inside = (bits(_mm256_cmpgt_epi32(low8, key)) | above) ^ 0xFF;
    if (inside) above |= decide(inside, x + i, out + i / 8, w);
    out[i / 8] = static_cast<uint8_t>(above);
  }
#endif
  for (; i < n; i += 8) {
    const int part = static_cast<int>(n - i < 8 ? n - i : 8);
    out[i / 8] = static_cast<uint8_t>(write_few(x + i, part, out + i / 8, w));
  }
}

namespace {

bool any_nan(const float* x, int64_t n) {
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) nan |= x[i] != x[i];
  return nan;
}

// keep[i] of a group of `size`: at least `gone` others of the group are lower.
FASTLM_INLINE void group(const float* x, int size, int gone, uint8_t* keep) {
  int32_t key[32];
  for (int i = 0; i < size; ++i) key[i] = key_of(x[i]);
  for (int i = 0; i < size; ++i) {
    int lower = 0;
    for (int j = 0; j < i; ++j) lower += key[j] <= key[i];
    for (int j = i + 1; j < size; ++j) lower += key[j] < key[i];
    keep[i] = lower >= gone;
  }
}

#if FASTLM_EIGHT
// Lane i is -1 where the score k lanes on (within its group, in a ring) is the lower one of the two. `wrapped` are the
// lanes whose partner comes before them, which wins a tie.
template <int kWrapped>
FASTLM_INLINE __m256i lower(__m256i key, __m256i partner) {
  const __m256i strict = _mm256_cmpgt_epi32(key, partner), not_lower = _mm256_cmpgt_epi32(partner, key);
  const __m256i wrapped = _mm256_blend_epi32(_mm256_setzero_si256(), ones(), kWrapped);
  return _mm256_xor_si256(_mm256_blend_epi32(strict, not_lower, kWrapped), wrapped);
}
FASTLM_INLINE __m256i invert(__m256i a) { return _mm256_xor_si256(a, ones()); }

FASTLM_INLINE int four(const float* x, __m256i limit) {
  const __m256i key = keys(x);
  const __m256i one = lower<0x88>(key, _mm256_shuffle_epi32(key, 0x39));  // partners 1 2 3 0
  const __m256i two = lower<0xCC>(key, _mm256_shuffle_epi32(key, 0x4E));  // 2 3 0 1
  const __m256i three = invert(_mm256_shuffle_epi32(one, 0x93));          // 3 0 1 2: the other side of `one`
  return bits(_mm256_cmpgt_epi32(limit, _mm256_add_epi32(one, _mm256_add_epi32(two, three))));
}

FASTLM_INLINE __m256i turn(__m256i a, int by) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_permutevar8x32_epi32(
      a, _mm256_and_si256(_mm256_add_epi32(lane, _mm256_set1_epi32(by)), _mm256_set1_epi32(7)));
}
FASTLM_INLINE int eight(const float* x, __m256i limit) {
  const __m256i key = keys(x);
  const __m256i one = lower<0x80>(key, turn(key, 1)), two = lower<0xC0>(key, turn(key, 2));
  const __m256i three = lower<0xE0>(key, turn(key, 3)), half = lower<0xF0>(key, turn(key, 4));
  const __m256i back =
      _mm256_add_epi32(_mm256_add_epi32(invert(turn(one, 7)), invert(turn(two, 6))), invert(turn(three, 5)));
  const __m256i ahead = _mm256_add_epi32(_mm256_add_epi32(one, two), _mm256_add_epi32(three, half));
  return bits(_mm256_cmpgt_epi32(limit, _mm256_add_epi32(ahead, back)));
}
#endif

}  // namespace

// The n:m mask of a piece that begins with a group. Returns whether there is a NaN.
bool prune_groups(const float* x, int64_t n, int keep, int m, uint8_t* out) {
  const bool nan = any_nan(x, n);
  int64_t i = 0;
#if FASTLM_EIGHT
  const __m256i limit = _mm256_set1_epi32(-(m - keep - 1));  // the sum of -1s is below it
  if (m == 4) {
    for (; i + 8 <= n; i += 8) out[i / 8] = static_cast<uint8_t>(four(x + i, limit));
  } else if (m == 8) {
    for (; i + 8 <= n; i += 8) out[i / 8] = static_cast<uint8_t>(eight(x + i, limit));
  }
#endif
  uint8_t kept[32];
  if (i < n) memset(out + i / 8, 0, static_cast<size_t>((n - i + 7) / 8));
  for (; i < n; i += m) {
    const int size = static_cast<int>(n - i < m ? n - i : m);
    group(x + i, size, size > keep ? size - keep : 0, kept);
    for (int j = 0; j < size; ++j) out[(i + j) / 8] |= static_cast<uint8_t>(kept[j] << ((i + j) & 7));
  }
  return nan;
}

namespace {

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t Codes __attribute__((vector_size(32)));
const uint8_t kPairs[6] = {3, 5, 9, 6, 10, 12};     // two of four columns, in the order of the reference
constexpr float kLargest = 2.1267647932558654e37f;  // 2^124

struct Classes {
  int size[19];
  uint8_t above[19][6][2], below[19][6][2];  // indices into kPairs
};

int filling(int a, int b) {  // two bits for each column
  int count = 0;
  for (int c = 0; c < 4; ++c) count += ((kPairs[a] >> c & 1) + (kPairs[b] >> c & 1)) << (2 * c);
  return count;
}

Classes make_classes() {
  Classes out = {};
  int seen[19], classes = 0;
  for (int a = 0; a < 6; ++a) {
    for (int b = 0; b < 6; ++b) {
      int i = 0;
      while (i < classes && seen[i] != filling(a, b)) ++i;
      if (i == classes) seen[classes++] = filling(a, b);
      uint8_t* place = out.above[i][out.size[i]++];
      place[0] = static_cast<uint8_t>(a), place[1] = static_cast<uint8_t>(b);
    }
  }
  for (int i = 0; i < classes; ++i) {
    int at = 0;
    for (int a = 0; a < 6; ++a) {
      for (int b = 0; b < 6; ++b) {
        if (filling(a, b) + seen[i] != 0xAA) continue;
        out.below[i][at][0] = static_cast<uint8_t>(a), out.below[i][at++][1] = static_cast<uint8_t>(b);
      }
    }
  }
  return out;
}

FASTLM_INLINE void best_of(const Eight* first, const Eight* second, const uint8_t (*pairs)[2], int size, Eight* best,
                           Codes* code) {
  for (int i = 0; i < size; ++i) {
    const Eight sum = first[pairs[i][0]] + second[pairs[i][1]];
    const int32_t c = kPairs[pairs[i][0]] | kPairs[pairs[i][1]] << 4;
    const Codes codes = {c, c, c, c, c, c, c, c};
    if (i == 0) {
      *best = sum, *code = codes;
    } else {
      const Codes better = sum > *best;
      *best = better ? sum : *best, *code = better ? codes : *code;
    }
  }
}

}  // namespace

// The 2:4t mask of four rows' pieces of n columns, a multiple of 4. Returns whether there is a NaN.
bool prune_transposable(const float* const* rows, int64_t n, uint8_t* const* out) {
  static const Classes classes = make_classes();  // at the first call: as a global it would run on every processor
  bool nan = false;
  for (int r = 0; r < 4; ++r) {
    nan = any_nan(rows[r], n) || nan;
    memset(out[r], 0, static_cast<size_t>((n + 7) / 8));
  }
  for (int64_t at = 0; at < n; at += 32) {
    const int blocks = static_cast<int>(n - at < 32 ? (n - at) / 4 : 8);
    Eight sums[4][6];
    for (int r = 0; r < 4; ++r) {
      float lane[4][8] = {};
      for (int b = 0; b < blocks; ++b) {
        for (int c = 0; c < 4; ++c) {
          float x = rows[r][at + 4 * b + c];
          x = x < kLargest ? x : kLargest;
          lane[c][b] = x > -kLargest ? x : -kLargest;
        }
      }
      Eight column[4];
      memcpy(column, lane, sizeof column);
      int pair = 0;
      for (int a = 0; a < 4; ++a) {
        for (int b = a + 1; b < 4; ++b) sums[r][pair++] = column[a] + column[b];
      }
    }
    Eight best, top, bottom;
    Codes code, upper, lower_;
    for (int i = 0; i < 19; ++i) {
      best_of(sums[0], sums[1], classes.above[i], classes.size[i], &top, &upper);
      best_of(sums[2], sums[3], classes.below[i], classes.size[i], &bottom, &lower_);
      const Eight sum = top + bottom;
      const Codes codes = upper | lower_ << 8;
      if (i == 0) {
        best = sum, code = codes;
      } else {
        const Codes better = sum > best;
        best = better ? sum : best, code = better ? codes : code;
      }
    }
    for (int b = 0; b < blocks; ++b) {
      const int64_t column = at + 4 * b;
      for (int r = 0; r < 4; ++r) {
        out[r][column / 8] |= static_cast<uint8_t>((code[b] >> (4 * r) & 15) << (column & 4));
      }
    }
  }
  return nan;
}

// lanes[i mod 16] += x[i]. Returns whether there is a NaN.
bool prune_row_lanes(const float* x, int64_t n, float* lanes) {
  Vec sum = load(lanes);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = sum + load(x + i);
  store(lanes, sum);
  for (; i < n; ++i) lanes[i % kLanes] += x[i];
  return any_nan(x, n);
}
bool prune_column_lanes(const float* x, int64_t n, float* sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] += x[i];
  return any_nan(x, n);
}
float prune_tree(const float* lanes) { return sum(load(lanes)); }

// +0 where the mask is 0; n elements of 4 or 2 bytes.
void prune_apply(char* x, int size, int64_t stride, int64_t n, const uint8_t* mask) {
  int64_t i = 0;
#if FASTLM_EIGHT
  if (stride == 1 && size == 4) {
    const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (; i + 8 <= n; i += 8) {
      __m256i* at = reinterpret_cast<__m256i*>(x + 4 * i);
      const __m256i keep = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask[i / 8]), place), place);
      _mm256_storeu_si256(at, _mm256_and_si256(_mm256_loadu_si256(at), keep));
    }
  } else if (stride == 1) {
    const __m128i place = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
    for (; i + 8 <= n; i += 8) {
      __m128i* at = reinterpret_cast<__m128i*>(x + 2 * i);
      const __m128i keep = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(mask[i / 8]), place), place);
      _mm_storeu_si128(at, _mm_and_si128(_mm_loadu_si128(at), keep));
    }
  }
#endif
  for (; i < n; ++i) {
    if (mask[i / 8] >> (i & 7) & 1) continue;
    if (size == 4) {
      reinterpret_cast<uint32_t*>(x)[i * stride] = 0;
    } else {
      reinterpret_cast<uint16_t*>(x)[i * stride] = 0;
    }
  }
}

int64_t prune_popcount(const uint8_t* mask, int64_t n) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    memcpy(&word, mask + i, 8);
    count += __builtin_popcountll(word);
  }
  for (; i < n; ++i) count += __builtin_popcount(mask[i]);
  return count;
}
void prune_unpack(const uint8_t* mask, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = mask[i / 8] >> (i & 7) & 1;
}
void prune_pack(const uint8_t* keep, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    memcpy(&word, keep + i, 8);
    out[i / 8] = static_cast<uint8_t>(((word & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
  }
  if (i < n) out[i / 8] = 0;
  for (; i < n; ++i) out[i / 8] |= static_cast<uint8_t>((keep[i] & 1) << (i & 7));
}

// Every word of a range, so that the compiler cannot leave the reads out: what reading costs, for the benchmarks.
uint64_t read_words(const char* from, int64_t bytes) {
  typedef uint64_t Words __attribute__((vector_size(32), may_alias, aligned(1)));
  Words a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 128 <= bytes; i += 128) {
    const Words* w = reinterpret_cast<const Words*>(from + i);
    a |= w[0], b |= w[1], c |= w[2], d |= w[3];
  }
  a |= b, c |= d, a |= c;
  uint64_t out = a[0] | a[1] | a[2] | a[3];
  for (; i < bytes; ++i) out |= static_cast<uint8_t>(from[i]);
  return out;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
