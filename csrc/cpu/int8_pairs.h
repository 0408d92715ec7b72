// int8 products of many rows on AVX2: operands widened to int16, once for a task, and multiplied in pairs.
//
// A product of pairs (madd) and a sum serve sixteen products, and no sign has to move: the tile is bound by the
// multipliers alone. It is exact for every byte, -128 included. A panel holds sixteen columns, [block / 2][16][2], and
// stays in the first cache while the rows of the task pass by, six at a time; sums lie panel by panel, [rows][16].
#pragma once
#include "cpu/int8_epilogue.h"
#include "cpu/int8_squares.h"

#if FASTLM_ISA_avx2
namespace fastlm {
namespace FASTLM_ISA {
namespace pairs {

using int8_matmul_call::Call;
using int8_matmul_call::Tiles;

constexpr int kRows = 6;

// Columns [column, column + count) of the weight from k on, [steps * 8][16][2]; 0 beyond the last.
FASTLM_NOINLINE void fill_panel(const Call& call, int64_t k, int64_t steps, int64_t column, int count, int16_t* to) {
  int8_t bytes[kLanes][kLanes];
  for (int64_t j = 0; j < steps; ++j, k += kLanes) {
    square(call, k, column, count, bytes);
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2, to += 2 * kLanes) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[i]));
      const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[i + 1]));
      __m256i* line = reinterpret_cast<__m256i*>(to);
      _mm256_storeu_si256(line, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y)));
      _mm256_storeu_si256(line + 1, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y)));
    }
  }
}

// `depth` bytes, `step` apart, as int16, with zeros up to a multiple of sixteen.
FASTLM_NOINLINE void fill_row(const int8_t* from, int64_t step, int64_t depth, int16_t* to) {
  int64_t i = 0;
  for (; step == 1 && i + kLanes <= depth; i += kLanes) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepi8_epi16(x));
  }
  for (; i < depth; ++i) to[i] = from[i * step];
  for (; i % kLanes; ++i) to[i] = 0;
}

// sums [kCount][16] += the products of kCount rows, `stride` apart, with a panel.
template <int kCount>
FASTLM_NOINLINE void tile(const int16_t* a, int64_t stride, const int16_t* panel, int64_t steps, int32_t* sums) {
  __m256i s[kCount][2];
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) s[r][0] = s[r][1] = _mm256_setzero_si256();
  for (int64_t i = 0; i < steps * kLanes; i += 2, panel += 2 * kLanes) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel) + 1);
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
      int32_t two;
      memcpy(&two, a + r * stride + i, sizeof two);
      const __m256i x = _mm256_set1_epi32(two);
      s[r][0] = _mm256_add_epi32(s[r][0], _mm256_madd_epi16(x, low));
      s[r][1] = _mm256_add_epi32(s[r][1], _mm256_madd_epi16(x, high));
      // Row after row: all products first, as GCC has it, would leave no register for the sums.
      asm volatile("" : "+x"(s[r][0]), "+x"(s[r][1]));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
    __m256i* to = reinterpret_cast<__m256i*>(sums + r * kLanes);
    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), s[r][0]));
    _mm256_storeu_si256(to + 1, _mm256_add_epi32(_mm256_loadu_si256(to + 1), s[r][1]));
  }
}

FASTLM_INLINE void some_rows(int64_t rows, const int16_t* a, int64_t stride, const int16_t* panel, int64_t steps,
                             int32_t* sums) {
  switch (rows) {
    case 1:
      return tile<1>(a, stride, panel, steps, sums);
    case 2:
      return tile<2>(a, stride, panel, steps, sums);
    case 3:
      return tile<3>(a, stride, panel, steps, sums);
    case 4:
      return tile<4>(a, stride, panel, steps, sums);
    case 5:
      return tile<5>(a, stride, panel, steps, sums);
    default:
      return tile<kRows>(a, stride, panel, steps, sums);
  }
}

FASTLM_NOINLINE void task(const Call& call, const Tiles& tiles, int64_t row, int64_t column, char* scratch) {
  const int64_t rows = lesser(tiles.rows, call.m - row), count = lesser(tiles.columns, call.n - column);
  const int64_t stride = tiles.block + kLanes;  // rows off a power of two
  int32_t* sums = reinterpret_cast<int32_t*>(scratch);
  int16_t* panel = reinterpret_cast<int16_t*>(sums + tiles.rows * tiles.columns);
  int16_t* a = panel + tiles.block * kLanes;
  memset(sums, 0, static_cast<size_t>(rows * tiles.columns) * sizeof(int32_t));
  Columns columns;
  for (int64_t from = 0; from < call.k; from += tiles.block) {
    const int64_t depth = lesser(call.k - from, tiles.block), steps = (depth + kLanes - 1) / kLanes;
    for (int64_t r = 0; r < rows; ++r) {
      const char* line = call.a + (row + r) * call.a_stride[0] + from * call.a_stride[1];
      fill_row(reinterpret_cast<const int8_t*>(line), call.a_stride[1], depth, a + r * stride);
    }
    for (int64_t c = 0; c < count; c += kLanes) {
      const int some = static_cast<int>(lesser(kLanes, count - c));
      fill_panel(call, from, steps, column + c, some, panel);
      int32_t* of_panel = sums + c * rows;
      for (int64_t r = 0; r < rows; r += kRows) {
        some_rows(lesser(kRows, rows - r), a + r * stride, stride, panel, steps, of_panel + r * kLanes);
      }
      if (from + tiles.block < call.k) continue;
      Columns::fill(columns, call, column + c, some);
      for (int64_t r = 0; r < rows; ++r) write_sums(call, columns, of_panel + r * kLanes, row + r, column + c, some);
    }
  }
}

}  // namespace pairs
}  // namespace FASTLM_ISA
}  // namespace fastlm
#endif
