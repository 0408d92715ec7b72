// int8_matmul with a floating a (weight-only), compiled once for each
// instruction set.
//
//   y = activation(a @ (b * b_scale) + bias), sums in float32
//
// Few rows: weights become floats on their way from memory into the sum, which
// costs the memory's time alone. Many rows: a panel of weights becomes floats
// once and stays in the cache while the rows of a task pass by. Either way a
// sum adds the same products in the same lanes: blocks of kBlock along K, in
// each sixteen lanes folded by a fixed tree, the blocks in order. A scale of a
// column multiplies the sum, that of a group the weight.
#include "cpu/int8_epilogue.h"
#include "cpu/int8_matmul.h"

namespace fastlm {
namespace FASTLM_ISA {

using int8_matmul_call::Call;
using int8_matmul_call::Tiles;

namespace {

constexpr int64_t kBlock = 1024;  // of K: eight rows of floats fit into the first cache

FASTLM_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// n elements of a line of a, `step` apart, as floats, with zeros up to a
// multiple of sixteen.
FASTLM_NOINLINE void to_floats(const char* from, int64_t dtype, int64_t step, int64_t n, float* to) {
  const int64_t size = size_of(dtype) * step;
  for (int64_t i = 0; i < n; i += kLanes) {
    store(to + i, load_strided(from + i * size, dtype, step, static_cast<int>(n - i < kLanes ? n - i : kLanes)));
  }
}

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
FASTLM_NOINLINE void gather_column(const Call& call, int64_t column, int64_t from, int64_t count, int8_t* to) {
  const int8_t* b = call.b + column * call.b_stride[1] + from * call.b_stride[0];
  for (int64_t i = 0; i < count; ++i) to[i] = b[i * call.b_stride[0]];
}

// kRows rows by kColumns columns of weights as they lie: sums over [from, to)
// of K. More than one chain of sums where there is but one row: the latency of
// a sum must not hold the memory up.
template <int kRows, int kColumns>
FASTLM_INLINE void direct(const Call& call, const float* a, int64_t stride, const int8_t* b, const float* scales,
                          int64_t from, int64_t to, float* sums, int64_t step) {
  Vec s[kRows][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) s[r][c] = zero();
  }
  for (int64_t k = from; k < to; k += kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      prefetch(b + (c + kColumns) * call.b_stride[1] + k);  // the next columns: a weight's row may end with its page
      const Vec w = weights(call, b + c * call.b_stride[1], scales ? scales + c * call.b_scale_stride : nullptr, k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) s[r][c] = fma(load(a + r * stride + k), w, s[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sums[r * step + c] += sum(s[r][c]);
  }
}

#if FASTLM_ISA_avx512
constexpr int kTileRows = 4, kTileColumns = 4;
#elif FASTLM_ISA_avx2
constexpr int kTileRows = 3, kTileColumns = 2;
#else
constexpr int kTileRows = 1, kTileColumns = 2;
#endif
// kRows rows by kColumns columns of floats: sums over k elements, a multiple of
// sixteen.
template <int kRows, int kColumns>
FASTLM_INLINE void tile(const float* a, int64_t stride, const float* w, int64_t w_stride, int64_t k, float* sums,
                        int64_t step) {
  Vec s[kRows][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) s[r][c] = zero();
  }
  for (int64_t i = 0; i < k; i += kLanes) {
    Vec y[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) y[c] = load(w + c * w_stride + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load(a + r * stride + i);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) s[r][c] = fma(x, y[c], s[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sums[r * step + c] += sum(s[r][c]);
  }
}

template <int kRows>
FASTLM_NOINLINE void rows_by_panel(const float* a, int64_t stride, const float* w, int64_t w_stride, int64_t k,
                                   int count, float* sums, int64_t step) {
  int c = 0;
  for (; c + kTileColumns <= count; c += kTileColumns) {
    tile<kRows, kTileColumns>(a, stride, w + c * w_stride, w_stride, k, sums + c, step);
  }
  for (; c < count; ++c) tile<kRows, 1>(a, stride, w + c * w_stride, w_stride, k, sums + c, step);
}

template <int kRows, int kColumns>
FASTLM_INLINE void all_blocks(const Call& call, const float* a, int64_t stride, int64_t column, float* sums,
                              int64_t step) {
  const float* scales = call.group ? call.b_scale + column * call.b_scale_stride : nullptr;
  const int8_t* b = call.b + column * call.b_stride[1];
  for (int64_t from = 0; from < call.k; from += kBlock) {
    direct<kRows, kColumns>(call, a, stride, b, scales, from, lesser(call.k, from + kBlock), sums, step);
  }
}
template <int kRows, int kColumns>
FASTLM_NOINLINE void few_rows(const Call& call, const float* a, int64_t stride, int64_t column, int count, float* sums,
                              int64_t step) {
  int c = 0;
  for (; c + kColumns <= count; c += kColumns) {
    all_blocks<kRows, kColumns>(call, a, stride, column + c, sums + c, step);
  }
  for (; c < count; ++c) all_blocks<kRows, 1>(call, a, stride, column + c, sums + c, step);
}

// Sums of a panel of columns for all rows of a task, [rows][panel].
void panel_sums(const Call& call, const Tiles& tiles, const float* a, int64_t stride, int64_t rows, int64_t column,
                int count, float* w, float* sums) {
  int8_t line[kBlock];
  for (int64_t from = 0; from < call.k; from += kBlock) {
    const int64_t k = lesser(call.k - from, kBlock), padded = (k + kLanes - 1) / kLanes * kLanes;
    for (int c = 0; c < count; ++c) {
      const float* scales = call.group ? call.b_scale + (column + c) * call.b_scale_stride : nullptr;
      const int8_t* b = call.b + (column + c) * call.b_stride[1];
      if (tiles.gather_b) {
        gather_column(call, column + c, from, k, line);
        b = line - from;
      }
      for (int64_t i = 0; i < padded; i += kLanes) store(w + c * kBlock + i, weights(call, b, scales, from + i));
    }
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
      rows_by_panel<kTileRows>(a + r * stride + from, stride, w, kBlock, padded, count, sums + r * tiles.panel,
                               tiles.panel);
    }
    for (; r < rows; ++r) {
      rows_by_panel<1>(a + r * stride + from, stride, w, kBlock, padded, count, sums + r * tiles.panel, tiles.panel);
    }
  }
}

void task(const Call& call, const Tiles& tiles, int64_t row, int64_t column, char* scratch) {
  const int64_t rows = lesser(tiles.rows, call.m - row), end = lesser(column + tiles.columns, call.n);
  const int64_t stride = (call.k + kLanes - 1) / kLanes * kLanes;
  float* a = reinterpret_cast<float*>(scratch);
  float* sums = a + tiles.rows * stride;
  float* w = sums + tiles.rows * tiles.panel;
  for (int64_t r = 0; r < rows; ++r) {
    to_floats(call.a + (row + r) * call.a_stride[0] * size_of(call.a_dtype), call.a_dtype, call.a_stride[1], call.k,
              a + r * stride);
  }
  Columns columns;
  for (int64_t c = column; c < end; c += tiles.panel) {
    const int count = static_cast<int>(lesser(tiles.panel, end - c));
    memset(sums, 0, static_cast<size_t>(rows * tiles.panel) * sizeof(float));
    if (rows == 1 && !tiles.gather_b) {
      few_rows<1, 4>(call, a, stride, c, count, sums, tiles.panel);
    } else if (rows == 2 && !tiles.gather_b) {
      few_rows<2, 2>(call, a, stride, c, count, sums, tiles.panel);
    } else {
      panel_sums(call, tiles, a, stride, rows, c, count, w, sums);
    }
    Columns::fill(columns, call, c, count);
    for (int64_t r = 0; r < rows; ++r) write_floats(call, columns, sums + r * tiles.panel, row + r, c, count);
  }
}

}  // namespace

void int8_weight_only(const Call& call, const Tiles& tiles, char* scratch) {
  const int64_t across = (call.n + tiles.columns - 1) / tiles.columns;
  const int64_t count = (call.m + tiles.rows - 1) / tiles.rows * across;
#ifdef _OPENMP
  if (call.threads > 1) {
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      task(call, tiles, i / across * tiles.rows, i % across * tiles.columns, scratch + thread_number() * tiles.scratch);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    task(call, tiles, i / across * tiles.rows, i % across * tiles.columns, scratch);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
