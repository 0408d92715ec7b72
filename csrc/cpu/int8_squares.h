// Weights as panels want them: squares of sixteen along K and sixteen columns, K first, wherever they lie.
#pragma once
#include "cpu/int8_tasks.h"

namespace fastlm {
namespace FASTLM_ISA {

#if FASTLM_ISA_avx2 || FASTLM_ISA_avx512
// Sixteen lines of sixteen bytes, `stride` apart, with rows and columns exchanged.
FASTLM_INLINE void exchange(const int8_t* from, int64_t stride, int8_t (*to)[kLanes]) {
  __m128i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  // Four times: line i and line i + 8 interleaved, which turns the index (line, byte) by one bit.
#pragma GCC unroll 4
  for (int turn = 0; turn < 4; ++turn) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i]), x[i]);
}
#else
FASTLM_INLINE void exchange(const int8_t* from, int64_t stride, int8_t (*to)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) to[j][i] = from[i * stride + j];
  }
}
#endif

// Sixteen weights along K, from k on, of sixteen columns: [k][column], 0 beyond the last of either.
FASTLM_INLINE void square(const int8_matmul_call::Call& call, int64_t k, int64_t column, int columns,
                          int8_t (*to)[kLanes]) {
  const int8_t* b = call.b + k * call.b_stride[0] + column * call.b_stride[1];
  const int64_t depth = lesser(kLanes, call.k - k);
  if (depth == kLanes && columns == kLanes && call.b_stride[0] == 1) {
    exchange(b, call.b_stride[1], to);
    return;
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    if (i < depth && columns == kLanes && call.b_stride[1] == 1) {
      memcpy(to[i], b + i * call.b_stride[0], kLanes);
      continue;
    }
    for (int64_t j = 0; j < kLanes; ++j) {
      to[i][j] = i < depth && j < columns ? b[i * call.b_stride[0] + j * call.b_stride[1]] : int8_t{0};
    }
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
