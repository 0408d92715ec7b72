// int8_matmul on the CPU, compiled once for each instruction set.
//
//   y = activation((float(a @ b) * a_scale) * b_scale + bias)   a, b int8: int8_product
//   y = activation(a @ (b * b_scale) + bias)                    a floating: int8_weight_only
//
// A weight [N, K] lies in memory as it is saved; every sum is a dot product of a row of a and a row of the weight, so
// nothing is packed. A task is a block of rows and columns. Within it a panel of columns stays in the first cache while
// all rows pass by, two rows and four columns at a time: 4 (2 + 4) bytes loaded for each 8 products of four bytes. Many
// rows on AVX2 go by int8_pairs.h. Bytes of a call: M K + N K + 4 M N, operations 2 M N K. Integers are exact, and each
// float sum has one order, whatever the task: the same bits at any thread count.
#include "cpu/int8_epilogue.h"
#include "cpu/int8_pairs.h"
#include "cpu/int8_tasks.h"

namespace fastlm {
namespace FASTLM_ISA {

using int8_matmul_call::Call;
using int8_matmul_call::Tiles;

namespace {

// Rows of int8: [count] runs of bytes, `stride` apart.
struct Rows {
  const int8_t* at;
  int64_t stride;
};

// count lines of length k, line_stride apart with elements step apart, as
// [count][k].
FASTLM_NOINLINE void gather(const int8_t* from, int64_t line_stride, int64_t step, int64_t count, int64_t k,
                            int8_t* to) {
  if (line_stride == 1) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < count; ++j) to[j * k + i] = from[i * step + j];
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < k; ++i) to[j * k + i] = from[j * line_stride + i * step];
  }
}

// sums[r][4] = a_r . b_c for kRows rows and four columns. Columns beyond the
// last repeat it. kAhead asks for the bytes `ahead` of each column, those of
// the next four: processors do not look past the page in which a row of weights
// may end.
template <int kRows, bool kLow, bool kAhead>
FASTLM_INLINE void tile(const Rows& a, const int8_t* const* b, int64_t ahead, int64_t k, const RowInfo* info,
                        int32_t (*sums)[4]) {
  Sum s[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) s[r][c] = sum_zero();
  }
  int64_t i = 0;
  for (; i + kWide <= k; i += kWide) {
    Wide x[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) x[r] = wide_load(a.at + r * a.stride + i);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      if (kAhead) prefetch(b[c] + ahead + i);
      const Right y = right_of(wide_load(b[c] + i));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) s[r][c] = add_products<kLow>(s[r][c], x[r], y);
    }
  }
  if (i < k) {
    const int rest = static_cast<int>(k - i);
    Wide x[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) x[r] = wide_load_part(a.at + r * a.stride + i, rest);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Right y = right_of(wide_load_part(b[c] + i, rest));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) s[r][c] = add_products<kLow>(s[r][c], x[r], y);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) totals(s[r], info[r], sums[r]);
}

// kRows rows of a against a panel of columns, to the result.
template <int kRows, bool kAhead>
FASTLM_NOINLINE void rows_by_panel(const Call& call, const Rows& a, const Rows& b, const RowInfo* info,
                                   const Columns& columns, int64_t row, int64_t column, int count) {
  int32_t all[kRows][kMostPanel];
  bool low = false;
  for (int r = 0; r < kRows; ++r) low |= info[r].low;
  for (int c = 0; c < count; c += 4) {
    const int8_t* four[4];
    for (int j = 0; j < 4; ++j) four[j] = b.at + (c + j < count ? c + j : count - 1) * b.stride;
    int32_t sums[kRows][4];
    if (low) {
      tile<kRows, true, kAhead>(a, four, 4 * b.stride, call.k, info, sums);
    } else {
      tile<kRows, false, kAhead>(a, four, 4 * b.stride, call.k, info, sums);
    }
    for (int r = 0; r < kRows; ++r) memcpy(all[r] + c, sums[r], sizeof sums[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = (count + 3) / 4 * 4; c % kLanes; ++c) all[r][c] = 0;
    write_sums(call, columns, all[r], row + r, column, count);
  }
}

void product_task(const Call& call, const Tiles& tiles, int64_t row, int64_t column, char* scratch) {
  const int64_t rows = lesser(tiles.rows, call.m - row), end = lesser(column + tiles.columns, call.n);
  RowInfo* info = reinterpret_cast<RowInfo*>(scratch);
  int8_t* lines = reinterpret_cast<int8_t*>(info + tiles.rows);
  Rows a = {reinterpret_cast<const int8_t*>(call.a) + row * call.a_stride[0], call.a_stride[0]};
  if (tiles.gather_a) {
    gather(a.at, call.a_stride[0], call.a_stride[1], rows, call.k, lines);
    a = {lines, call.k};
    lines += tiles.rows * call.k;
  }
  for (int64_t r = 0; r < rows; ++r) info[r] = row_info(a.at + r * a.stride, call.k);
  Columns columns;
  for (int64_t c = column; c < end; c += tiles.panel) {
    const int count = static_cast<int>(lesser(tiles.panel, end - c));
    Rows b = {call.b + c * call.b_stride[1], call.b_stride[1]};
    if (tiles.gather_b) {
      gather(b.at, call.b_stride[1], call.b_stride[0], count, call.k, lines);
      b = {lines, call.k};
    }
    Columns::fill(columns, call, c, count);
    // The first rows bring the panel from memory.
    if (rows == 1) {
      rows_by_panel<1, true>(call, a, b, info, columns, row, c, count);
      continue;
    }
    rows_by_panel<2, true>(call, a, b, info, columns, row, c, count);
    int64_t r = 2;
    for (; r + 2 <= rows; r += 2) {
      rows_by_panel<2, false>(call, {a.at + r * a.stride, a.stride}, b, info + r, columns, row + r, c, count);
    }
    if (r < rows) {
      rows_by_panel<1, false>(call, {a.at + r * a.stride, a.stride}, b, info + r, columns, row + r, c, count);
    }
  }
}

}  // namespace

void int8_product(const Call& call, const Tiles& tiles, char* scratch) {
#if FASTLM_ISA_avx2
  if (tiles.block) return each_task(call, tiles, scratch, pairs::task);
#endif
  each_task(call, tiles, scratch, product_task);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
