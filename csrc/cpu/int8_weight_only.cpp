// int8_matmul with a floating a (weight-only), compiled once for each instruction set.
//
//   y = activation(a @ (b * b_scale) + bias), sums in float32
//
// One or two rows: weights become floats on their way from memory into the sum, which costs the memory's time alone.
// More: a panel of weights becomes floats once and stays in the cache while the rows of a task pass by, kRows rows at a
// time, each of their elements times a line of the panel. Either way a sum adds the same products in the same order,
// and so is the same bits: blocks of kFloatBlock along K; in each sixteen lanes, element k in lane k % 16, folded by
// the tree of sum(); the blocks in order. The panel holds lane after lane, [16][block / 16][columns], and the tree is
// walked lane by lane. A scale of a column multiplies the sum, that of a group the weight.
#include "cpu/int8_epilogue.h"
#include "cpu/int8_squares.h"
#include "cpu/int8_tasks.h"

namespace fastlm {
namespace FASTLM_ISA {

using int8_matmul_call::Call;
using int8_matmul_call::kFloatBlock;
using int8_matmul_call::Tiles;

namespace {

// Of a tile: rows of a, and vectors of sixteen columns. Their sums stay in registers.
#if FASTLM_ISA_avx512
constexpr int kRows = 6, kVectors = 2;
#elif FASTLM_ISA_avx2
constexpr int kRows = 6, kVectors = 1;
#else
constexpr int kRows = 2, kVectors = 1;
#endif
constexpr int kPanel = kVectors * kLanes;
constexpr int kMoreRows = 8;  // kRows, rounded up to a vector of eight
static_assert(kPanel <= int8_matmul_call::kMostFloatPanel, "the scratch of a task holds a panel");

// n elements of a line of a, `step` apart, as floats, with zeros up to a
// multiple of sixteen.
FASTLM_NOINLINE void to_floats(const char* from, int64_t dtype, int64_t step, int64_t n, float* to) {
  const int64_t size = size_of(dtype) * step;
  for (int64_t i = 0; i < n; i += kLanes) {
    store(to + i, load_strided(from + i * size, dtype, step, static_cast<int>(n - i < kLanes ? n - i : kLanes)));
  }
}

// --- one or two rows ---

// Sixteen weights of a column from k on as floats, times the scale of their
// group; beyond the last they are 0.
FASTLM_INLINE Vec weights(const Call& call, const int8_t* b, const float* scales, int64_t k) {
  Vec w;
  if (k + kLanes <= call.k) {
    w = int8_to_float(b + k);
  } else {
    int8_t part[kLanes] = {};
    memcpy(part, b + k, static_cast<size_t>(call.k - k));
    w = int8_to_float(part);
  }
  return scales ? w * set1(scales[k / call.group * call.b_group_stride]) : w;
}

// kCount rows by kColumns columns of weights as they lie: sums over [from, to) of K. More than one chain of sums where
// there is but one row: the latency of a sum must not hold the memory up. A turn takes one cache line of each column
// and asks for that of the next columns: a weight's row may end with its page, and processors do not look past it.
template <int kCount, int kColumns, bool kGroups>
FASTLM_INLINE void direct(const Call& call, const float* a, int64_t stride, const int8_t* b, const float* scales,
                          int64_t from, int64_t to, float* sums, int64_t step) {
  constexpr int kLine = 64;
  const int64_t apart = call.b_stride[1], ahead = kColumns * apart;
  Vec s[kCount][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) s[r][c] = zero();
  }
  int64_t k = from;
  for (; k + kLine <= to; k += kLine) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) prefetch(b + c * apart + ahead + k);
#pragma GCC unroll 4
    for (int i = 0; i < kLine; i += kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        Vec w = int8_to_float(b + c * apart + k + i);
        if (kGroups) {
          w = w * set1(scales[c * call.b_scale_stride + (k + i) / call.group * call.b_group_stride]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) s[r][c] = fma(load(a + r * stride + k + i), w, s[r][c]);
      }
    }
  }
  for (; k < to; k += kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const Vec w = weights(call, b + c * apart, kGroups ? scales + c * call.b_scale_stride : nullptr, k);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) s[r][c] = fma(load(a + r * stride + k), w, s[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sums[r * step + c] += sum(s[r][c]);
  }
}

template <int kCount, int kColumns>
FASTLM_INLINE void all_blocks(const Call& call, const float* a, int64_t stride, int64_t column, float* sums,
                              int64_t step) {
  const int8_t* b = call.b + column * call.b_stride[1];
  for (int64_t from = 0; from < call.k; from += kFloatBlock) {
    const int64_t to = lesser(call.k, from + kFloatBlock);
    if (call.group) {
      const float* scales = call.b_scale + column * call.b_scale_stride;
      direct<kCount, kColumns, true>(call, a, stride, b, scales, from, to, sums, step);
    } else {
      direct<kCount, kColumns, false>(call, a, stride, b, nullptr, from, to, sums, step);
    }
  }
}
template <int kCount, int kColumns>
FASTLM_NOINLINE void few_rows(const Call& call, const float* a, int64_t stride, int64_t column, int count, float* sums,
                              int64_t step) {
  int c = 0;
  for (; c + kColumns <= count; c += kColumns) {
    all_blocks<kCount, kColumns>(call, a, stride, column + c, sums + c, step);
  }
  for (; c < count; ++c) all_blocks<kCount, 1>(call, a, stride, column + c, sums + c, step);
}

void two_rows(const Call& call, int64_t row, int64_t rows, int64_t column, int64_t count, float* sums, int64_t step,
              float* a) {
  const int64_t stride = (call.k + kLanes - 1) / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const char* line = call.a + (row + r) * call.a_stride[0] * size_of(call.a_dtype);
    to_floats(line, call.a_dtype, call.a_stride[1], call.k, a + r * stride);
  }
  if (rows == 1) few_rows<1, 4>(call, a, stride, column, static_cast<int>(count), sums, step);
  if (rows == 2) few_rows<2, 2>(call, a, stride, column, static_cast<int>(count), sums, step);
  Columns columns;
  for (int64_t c = 0; c < count; c += kMostPanel) {
    const int some = static_cast<int>(lesser(kMostPanel, count - c));
    Columns::fill(columns, call, column + c, some);
    for (int64_t r = 0; r < rows; ++r) write_floats(call, columns, sums + r * step + c, row + r, column + c, some);
  }
}

// --- many rows ---

// The weights of kPanel columns as floats, times the scales of their groups: [16][steps][kPanel].
FASTLM_NOINLINE void fill_panel(const Call& call, int64_t from, int64_t steps, int64_t column, int count, float* w) {
  int8_t bytes[kLanes][kLanes];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first_column = column + v * kLanes;
    const int columns = count - v * kLanes < 0 ? 0 : count - v * kLanes < kLanes ? count - v * kLanes : kLanes;
    float scales[kLanes] = {};
    int64_t group = -1;
    for (int64_t j = 0; j < steps; ++j) {
      const int64_t k = from + j * kLanes;
      if (columns > 0) square(call, k, first_column, columns, bytes);
      if (columns == 0) memset(bytes, 0, sizeof bytes);
      if (call.group && k / call.group != group) {
        group = k / call.group;
        const float* s = call.b_scale + group * call.b_group_stride + first_column * call.b_scale_stride;
        for (int c = 0; c < columns; ++c) scales[c] = s[c * call.b_scale_stride];
      }
      const Vec scale = load(scales);
      float* to = w + j * kPanel + v * kLanes;
#pragma GCC unroll 4
      for (int l = 0; l < kLanes; ++l) {
        const Vec x = int8_to_float(bytes[l]);
        store(to + l * (steps + 1) * kPanel, call.group ? x * scale : x);
      }
    }
  }
}

#if FASTLM_ISA_avx2 || FASTLM_ISA_avx512
// Eight lines of eight floats, `stride` apart, with rows and columns exchanged: to[i] of eight, `step` apart.
FASTLM_INLINE void exchange(const float* from, int64_t stride, float* to, int64_t step) {
  __m256 x[8], y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // halves of lines i and i + 4 side by side
    const __m256 low = _mm256_loadu_ps(from + i * stride), high = _mm256_loadu_ps(from + (i + 4) * stride);
    x[i] = _mm256_permute2f128_ps(low, high, 0x20);
    x[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4) {
    y[h] = _mm256_unpacklo_ps(x[h], x[h + 2]);
    y[h + 1] = _mm256_unpackhi_ps(x[h], x[h + 2]);
    y[h + 2] = _mm256_unpacklo_ps(x[h + 1], x[h + 3]);
    y[h + 3] = _mm256_unpackhi_ps(x[h + 1], x[h + 3]);
    _mm256_storeu_ps(to + h * step, _mm256_unpacklo_ps(y[h], y[h + 2]));
    _mm256_storeu_ps(to + (h + 1) * step, _mm256_unpackhi_ps(y[h], y[h + 2]));
    _mm256_storeu_ps(to + (h + 2) * step, _mm256_unpacklo_ps(y[h + 1], y[h + 3]));
    _mm256_storeu_ps(to + (h + 3) * step, _mm256_unpackhi_ps(y[h + 1], y[h + 3]));
  }
}
#endif

// kRows or fewer rows of a as floats, [16][steps][rows] and 8 more for each lane. `lines` holds eight rows.
FASTLM_NOINLINE void fill_rows(const Call& call, int64_t row, int rows, int64_t from, int64_t steps, float* lines,
                               float* to) {
  const int64_t size = size_of(call.a_dtype), depth = lesser(call.k - from, kFloatBlock);
  const int64_t stride = steps * kLanes + kLanes, lane = steps * rows + kMoreRows;
  for (int r = 0; r < rows; ++r) {
    const char* a = call.a + ((row + r) * call.a_stride[0] + from * call.a_stride[1]) * size;
    to_floats(a, call.a_dtype, call.a_stride[1], depth, lines + r * stride);
  }
#if FASTLM_ISA_avx2 || FASTLM_ISA_avx512
  if (rows == kRows) {  // each store writes two rows too many, which the next one writes again
    for (int64_t j = 0; j < steps; ++j) {
      exchange(lines + j * kLanes, stride, to + j * kRows, lane);
      exchange(lines + j * kLanes + 8, stride, to + j * kRows + 8 * lane, lane);
    }
    return;
  }
#endif
  for (int r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < steps; ++j) {
      for (int l = 0; l < kLanes; ++l) to[l * lane + j * rows + r] = lines[r * stride + j * kLanes + l];
    }
  }
}

template <int kCount>
struct Sums {
  Vec at[kCount][kVectors];
};

// What a tile reads: rows of a and a panel, as fill_rows and fill_panel leave them.
struct Operands {
  const float *a, *w;
  int64_t steps;
};

// The sums of a branch of the tree of sum(): lane kFirst and every kApart-th from it.
template <int kCount, int kFirst, int kApart>
FASTLM_INLINE Sums<kCount> branch(const Operands& from) {
  if constexpr (kApart < kLanes) {
    const Sums<kCount> x = branch<kCount, kFirst, 2 * kApart>(from);
    Sums<kCount> y = branch<kCount, kFirst + kApart, 2 * kApart>(from);
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) y.at[r][v] = x.at[r][v] + y.at[r][v];
    }
    return y;
  } else {
    const float* a = from.a + kFirst * (from.steps * kCount + kMoreRows);
    const float* w = from.w + kFirst * (from.steps + 1) * kPanel;
    Sums<kCount> s;
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) s.at[r][v] = zero();
    }
    for (int64_t j = 0; j < from.steps; ++j) {
      Vec b[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) b[v] = load(w + j * kPanel + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kCount; ++r) {
        const Vec one = set1(a[j * kCount + r]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) s.at[r][v] = fma(one, b[v], s.at[r][v]);
      }
    }
    return s;
  }
}

// sums [kCount][kPanel] += the products of kCount rows of a with a panel.
template <int kCount>
FASTLM_NOINLINE void tile(const Operands& from, float* sums) {
  const Sums<kCount> s = branch<kCount, 0, 1>(from);
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + r * kPanel + v * kLanes;
      store(to, load(to) + s.at[r][v]);
    }
  }
}

FASTLM_INLINE void some_rows(int rows, const Operands& from, float* sums) {
  static_assert(kRows <= 6, "a case for each count of rows");
  switch (rows) {
    case 1:
      return tile<1>(from, sums);
    case 2:
      return tile<2>(from, sums);
#if FASTLM_ISA_avx2 || FASTLM_ISA_avx512
    case 3:
      return tile<3>(from, sums);
    case 4:
      return tile<4>(from, sums);
    case 5:
      return tile<5>(from, sums);
    default:
      return tile<6>(from, sums);
#endif
  }
}

// Sums of a task lie panel by panel, [rows][kPanel] each.
void many_rows(const Call& call, int64_t row, int64_t rows, int64_t column, int64_t count, float* sums, float* rest) {
  const int64_t most = lesser((call.k + kLanes - 1) / kLanes * kLanes, kFloatBlock) + kLanes;
  float *w = rest, *lines = w + most * kPanel, *a = lines + most * kMoreRows;
  Columns columns;
  for (int64_t from = 0; from < call.k || from == 0; from += kFloatBlock) {
    const int64_t steps = (lesser(call.k - from, kFloatBlock) + kLanes - 1) / kLanes;
    const int64_t a_step = steps * kLanes + kLanes * kMoreRows / kRows;  // of a row
    for (int64_t r = 0; r < rows; r += kRows) {
      fill_rows(call, row + r, static_cast<int>(lesser(kRows, rows - r)), from, steps, lines, a + r * a_step);
    }
    for (int64_t c = 0; c < count; c += kPanel) {
      const int some = static_cast<int>(lesser(kPanel, count - c));
      fill_panel(call, from, steps, column + c, some, w);
      for (int64_t r = 0; r < rows; r += kRows) {
        some_rows(static_cast<int>(lesser(kRows, rows - r)), {a + r * a_step, w, steps}, sums + c * rows + r * kPanel);
      }
      if (from + kFloatBlock < call.k) continue;
      Columns::fill(columns, call, column + c, some);
      for (int64_t r = 0; r < rows; ++r) {
        write_floats(call, columns, sums + c * rows + r * kPanel, row + r, column + c, some);
      }
    }
  }
}

void weight_only_task(const Call& call, const Tiles& tiles, int64_t row, int64_t column, char* scratch) {
  const int64_t rows = lesser(tiles.rows, call.m - row), count = lesser(tiles.columns, call.n - column);
  float* sums = reinterpret_cast<float*>(scratch);
  float* rest = sums + tiles.rows * tiles.columns;
  memset(sums, 0, static_cast<size_t>(rows * tiles.columns) * sizeof(float));
  if (rows <= 2 && !tiles.gather_b) {
    two_rows(call, row, rows, column, count, sums, tiles.columns, rest);
  } else {
    many_rows(call, row, rows, column, count, sums, rest);
  }
}

}  // namespace

void int8_weight_only(const Call& call, const Tiles& tiles, char* scratch) {
  each_task(call, tiles, scratch, weight_only_task);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
