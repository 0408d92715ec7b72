// Small matrix products on packed tiles, and the packing.
//
// A word is 32 bits: one float32, or (Pairs, AVX-512 only) two bfloat16 neighbours along the summed axis. The product
// C += A B sums words k in order; A is read one word at a time with any strides, B is rows of columns, C is float32.
// Every column is summed in the same order wherever it stands, so a score is the same bits in forward and backward.
// Scores of at most kPanel rows are dot products of rows (`dot`): for them no key is turned.
#pragma once
#include "cpu/attention_simd.h"

namespace fastlm {
namespace FASTLM_ISA {

typedef uint32_t __attribute__((may_alias)) Word;

constexpr int kPanel = 4;     // rows of a micro-tile
constexpr int kColumns = 64;  // columns of a panel of B: with AVX-512 four registers
#if FASTLM_ISA_avx512
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

FASTLM_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
FASTLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

#if FASTLM_ISA_avx512
typedef __m512 Lane;
constexpr int kLane = 16, kMostLanes = 4;
FASTLM_INLINE Lane lane_load(const void* p) { return _mm512_loadu_ps(p); }
FASTLM_INLINE void lane_store(float* p, Lane x) { _mm512_storeu_ps(p, x); }
FASTLM_INLINE Lane lane_word(const Word* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p))); }
FASTLM_INLINE Lane lane_zero() { return _mm512_setzero_ps(); }
template <bool Pairs>
FASTLM_INLINE Lane lane_add(Lane c, Lane a, Lane b) {
  if (Pairs) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  return _mm512_fmadd_ps(a, b, c);
}
#elif FASTLM_ISA_avx2
typedef __m256 Lane;
constexpr int kLane = 8, kMostLanes = 2;
FASTLM_INLINE Lane lane_load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
FASTLM_INLINE void lane_store(float* p, Lane x) { _mm256_storeu_ps(p, x); }
FASTLM_INLINE Lane lane_word(const Word* p) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*p))); }
FASTLM_INLINE Lane lane_zero() { return _mm256_setzero_ps(); }
template <bool Pairs>
FASTLM_INLINE Lane lane_add(Lane c, Lane a, Lane b) {
  return _mm256_fmadd_ps(a, b, c);
}
#else
typedef Four Lane;
constexpr int kLane = 4, kMostLanes = 2;
FASTLM_INLINE Lane lane_load(const void* p) { return *static_cast<const Four*>(p); }
FASTLM_INLINE void lane_store(float* p, Lane x) { *reinterpret_cast<Four*>(p) = x; }
FASTLM_INLINE Lane lane_word(const Word* p) {
  float x;
  memcpy(&x, p, 4);
  const Lane all = {x, x, x, x};
  return all;
}
FASTLM_INLINE Lane lane_zero() {
  const Lane none = {0.0f, 0.0f, 0.0f, 0.0f};
  return none;
}
template <bool Pairs>
FASTLM_INLINE Lane lane_add(Lane c, Lane a, Lane b) {
  return a * b + c;
}
#endif

// R rows of C by N lanes.
template <bool Pairs, int R, int N>
FASTLM_NOINLINE void micro(int64_t k, const Word* a, int64_t row, int64_t step, const Word* b, int64_t ldb, float* c,
                           int64_t ldc, bool add) {
  Lane sums[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[i][j] = lane_zero();
  }
  for (; k > 0; --k) {
    Lane columns[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) columns[j] = lane_load(b + j * kLane);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Lane x = lane_word(a + i * row);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[i][j] = lane_add<Pairs>(sums[i][j], x, columns[j]);
    }
    a += step;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* at = c + i * ldc + j * kLane;
      lane_store(at, add ? lane_load(at) + sums[i][j] : sums[i][j]);
    }
  }
}

constexpr int kBlock = 64;
template <bool Pairs, int R>
FASTLM_INLINE void multiply_rows(int columns, int64_t k, const Word* a, int64_t row, int64_t step, const Word* b,
                                 int64_t ldb, float* c, int64_t ldc, bool add) {
  for (; k > 0; k -= kBlock) {
    const int64_t depth = k < kBlock ? k : kBlock;
    int left = columns;
    const Word* bs = b;
    float* cs = c;
    for (constexpr int wide = kMostLanes * kLane; left >= wide; left -= wide) {
      micro<Pairs, R, kMostLanes>(depth, a, row, step, bs, ldb, cs, ldc, add);
      bs += wide;
      cs += wide;
    }
#if FASTLM_ISA_avx512
    if (left == 48) micro<Pairs, R, 3>(depth, a, row, step, bs, ldb, cs, ldc, add);
    if (left == 32) micro<Pairs, R, 2>(depth, a, row, step, bs, ldb, cs, ldc, add);
    if (left == 16) micro<Pairs, R, 1>(depth, a, row, step, bs, ldb, cs, ldc, add);
#endif
    a += kBlock * step;
    b += kBlock * ldb;
    add = true;
  }
}

// Up to kPanel rows by `columns` (a multiple of 16, at most kColumns) of C (+)= A B, in blocks of the sum of kBlock
// words: rounding errors of a block do not meet those of the next.
template <bool Pairs>
FASTLM_INLINE void multiply(int rows, int columns, int64_t k, const Word* a, int64_t row, int64_t step, const Word* b,
                            int64_t ldb, float* c, int64_t ldc, bool add) {
  if (rows >= kPanel) return multiply_rows<Pairs, kPanel>(columns, k, a, row, step, b, ldb, c, ldc, add);
  if (rows == 3) return multiply_rows<Pairs, 3>(columns, k, a, row, step, b, ldb, c, ldc, add);
  if (rows == 2) return multiply_rows<Pairs, 2>(columns, k, a, row, step, b, ldb, c, ldc, add);
  multiply_rows<Pairs, 1>(columns, k, a, row, step, b, ldb, c, ldc, add);
}

// c + the products of sixteen words of a and b, lane by lane.
template <bool Pairs>
FASTLM_INLINE Vec add_words(Vec c, const Word* a, const Word* b) {
#if FASTLM_ISA_avx512
  return {lane_add<Pairs>(c.v, lane_load(a), lane_load(b))};
#else
  return fma(load(reinterpret_cast<const float*>(a)), load(reinterpret_cast<const float*>(b)), c);
#endif
}

// The sums of the sixteen lanes of sixteen vectors.
FASTLM_INLINE Vec totals(const Vec* rows) {
#if FASTLM_ISA_avx512
  __m512 s[8], t[4];
  // Halves, quarters, pairs, lanes: each step adds what two vectors still hold apart into one.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 x = rows[i].v, y = rows[i + 8].v;
    s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[i], s[i + 4], 0x88), _mm512_shuffle_f32x4(s[i], s[i + 4], 0xdd));
  }
  // t[i], quarter by quarter: rows i, i + 8, i + 4, i + 12
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(t[0], t[2]), _mm512_unpackhi_ps(t[0], t[2]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(t[1], t[3]), _mm512_unpackhi_ps(t[1], t[3]));
  const __m512 all = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  // all: rows 0 1 2 3, 8 9 10 11, 4 5 6 7, 12 13 14 15
  return {_mm512_shuffle_f32x4(all, all, 0xd8)};
#else
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = sum(rows[i]);
  return load(lanes);
#endif
}

// A few rows against columns that lie as rows: c[i][j] = row i of a . row j of b, for a multiple of 16 of j. Nothing is
// turned, and sums of lanes are as exact as PyTorch's.
template <bool Pairs, int R>
FASTLM_NOINLINE void dot_rows(int words, const Word* a, int64_t a_row, const Word* b, int64_t b_row, int64_t columns,
                              float* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += 16) {
    Vec sums[R][16];
    for (int l = 0; l < 16; ++l) {
      const Word* row = b + (j + l) * b_row;
      Vec part[R];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) part[i] = zero();
      for (int w = 0; w < words; w += 16) {
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) part[i] = add_words<Pairs>(part[i], a + i * a_row + w, row + w);
      }
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) sums[i][l] = part[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) store(c + i * ldc + j, totals(sums[i]));
  }
}
template <bool Pairs>
FASTLM_INLINE void dot(int rows, int words, const Word* a, int64_t a_row, const Word* b, int64_t b_row, int64_t columns,
                       float* c, int64_t ldc) {
  if (rows == 1) return dot_rows<Pairs, 1>(words, a, a_row, b, b_row, columns, c, ldc);
  if (rows == 2) return dot_rows<Pairs, 2>(words, a, a_row, b, b_row, columns, c, ldc);
  if (rows == 3) return dot_rows<Pairs, 3>(words, a, a_row, b, b_row, columns, c, ldc);
  dot_rows<Pairs, 4>(words, a, a_row, b, b_row, columns, c, ldc);
}

// --- packing ---

// Rows of a tensor as contiguous words, `words` a row (a multiple of 16), zeros beyond its n columns and its rows.
template <bool Pairs>
FASTLM_NOINLINE void pack_rows(Word* to, int words, const char* from, int64_t dtype, int64_t row_stride, int64_t stride,
                               int64_t rows, int64_t rows_padded, int n) {
  const int size = size_of(dtype);
  for (int64_t r = 0; r < rows; ++r) {
    const char* source = from + r * row_stride * size;
    Word* row = to + r * words;
    if (Pairs) {
      char* bytes = reinterpret_cast<char*>(row);
      if (dtype == kBFloat16 && stride == 1) {
        memcpy(bytes, source, static_cast<size_t>(2 * n));
        if (n < 2 * words) memset(bytes + 2 * n, 0, static_cast<size_t>(2 * (2 * words - n)));
      } else {
        for (int c = 0; c < 2 * words; c += 16) {
          const Vec x = c < n ? load_strided(source + c * stride * size, dtype, stride, n - c) : zero();
          BF16::store(bytes + 2 * c, BF16::round(x));
        }
      }
    } else if (dtype == kFloat32 && stride == 1 && n == words) {
      memcpy(row, source, static_cast<size_t>(4 * n));
    } else {
      for (int c = 0; c < words; c += 16) {
        const Vec x = c < n ? load_strided(source + c * stride * size, dtype, stride, n - c) : zero();
        store(reinterpret_cast<float*>(row + c), x);
      }
    }
  }
  if (rows_padded > rows) memset(to + rows * words, 0, static_cast<size_t>((rows_padded - rows) * words) * 4);
}

// 16 rows of 16 words, turned.
FASTLM_INLINE void transpose16(Word* to, int64_t to_row, const Word* from, int64_t from_row) {
#if FASTLM_ISA_avx512
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_row);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * to_row, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_row, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_row, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_row, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
#endif
}

// `rows` rows (a multiple of 16), from_row words apart, as columns: panels of kColumns rows, each of `words` rows of
// kColumns words.
FASTLM_NOINLINE void pack_turned(Word* to, const Word* from, int64_t from_row, int words, int64_t rows) {
  for (int64_t r = 0; r < rows; r += 16) {
    Word* panel = to + (r / kColumns) * words * kColumns + r % kColumns;
    for (int w = 0; w < words; w += 16) transpose16(panel + w * kColumns, kColumns, from + r * from_row + w, from_row);
  }
}

// Rows of bfloat16 (`words` words each, from_row apart, `rows` even) two by two: word c of row r holds column c of rows
// 2r and 2r + 1.
FASTLM_NOINLINE void pack_pairs(Word* to, const Word* from, int64_t from_row, int words, int64_t rows) {
#if FASTLM_ISA_avx512
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t r = 0; r < rows; r += 2) {
    const Word *x = from + r * from_row, *y = x + from_row;
    Word* row = to + r * words;
    for (int w = 0; w < words; w += 16) {
      const __m512i a = _mm512_loadu_si512(x + w), b = _mm512_loadu_si512(y + w);
      _mm512_storeu_si512(row + 2 * w, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(row + 2 * w + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
#else
  (void)to, (void)from, (void)from_row, (void)words, (void)rows;
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
