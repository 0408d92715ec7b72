// Dot products of int8 rows for every instruction set, exact: |a b| <= 2^14 and K <= 131,071 fit into int32.
//
//   Wide             kWide int8 values of one row;  load, load_last (the last ones of a row, zeros before them)
//   RowInfo          what a product needs to know of a row of a
//   Sum              int32 lanes; add_products<kLow>(sum, a, b)
//   totals           the sums of four Sums, less what the row owes
//
// AVX2 has no product of signed bytes. maddubs multiplies unsigned by signed and adds pairs in int16: |b| by a with the
// sign of b. With |a| <= 127 a pair is at most 2 * 128 * 127 = 32,512, which fits. Where a row of a holds -128
// (quantisation makes none) its products are of int16 (kLow). AVX-512 VNNI multiplies b + 128, unsigned, by a; 128
// times the sum of the row of a is taken off at the end, modulo 2^32, and so exactly. The saturating form of the
// instruction is never used.
#pragma once
#include "cpu/simd.h"

namespace fastlm {
namespace FASTLM_ISA {

struct RowInfo {
  int32_t sum;  // of the row, modulo 2^32
  bool low;     // holds -128
};

#if FASTLM_ISA_avx512
constexpr int kWide = 64;
typedef __m512i Wide;
typedef __m512i Sum;
FASTLM_INLINE Wide wide_load(const int8_t* p) { return _mm512_loadu_si512(p); }
FASTLM_INLINE Wide wide_load_part(const int8_t* p, int n) {
  return _mm512_maskz_loadu_epi8(n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1, p);
}
FASTLM_INLINE Sum sum_zero() { return _mm512_setzero_si512(); }
struct Right {
  Wide b;
};
FASTLM_INLINE Right right_of(Wide b) { return {_mm512_xor_si512(b, _mm512_set1_epi8(-128))}; }
template <bool kLow>
FASTLM_INLINE Sum add_products(Sum s, Wide a, Right b) {
  return _mm512_dpbusd_epi32(s, b.b, a);
}
FASTLM_INLINE __m128i folded(Sum s) {
  const __m256i x = _mm256_add_epi32(_mm512_castsi512_si256(s), _mm512_extracti64x4_epi64(s, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
FASTLM_INLINE void totals(const Sum* s, const RowInfo& row, int32_t* out) {
  const __m128i x = _mm_hadd_epi32(folded(s[0]), folded(s[1])), y = _mm_hadd_epi32(folded(s[2]), folded(s[3]));
  const int owed = static_cast<int>(static_cast<uint32_t>(row.sum) << 7);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_sub_epi32(_mm_hadd_epi32(x, y), _mm_set1_epi32(owed)));
}
FASTLM_INLINE RowInfo row_info(const int8_t* a, int64_t k) {
  __m512i s = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < k; i += 64) {
    s = _mm512_dpbusd_epi32(s, ones, wide_load_part(a + i, k - i < 64 ? static_cast<int>(k - i) : 64));
  }
  return {_mm512_reduce_add_epi32(s), false};
}
#elif FASTLM_ISA_avx2
constexpr int kWide = 32;
typedef __m256i Wide;
typedef __m256i Sum;
FASTLM_INLINE Wide wide_load(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FASTLM_INLINE Wide wide_load_part(const int8_t* p, int n) {
  if (n >= 32) return wide_load(p);
  int8_t bytes[32] = {};
  memcpy(bytes, p, static_cast<size_t>(n));
  return wide_load(bytes);
}
FASTLM_INLINE Sum sum_zero() { return _mm256_setzero_si256(); }
struct Right {
  Wide b, size;
};
FASTLM_INLINE Right right_of(Wide b) { return {b, _mm256_abs_epi8(b)}; }
template <bool kLow>
FASTLM_INLINE Sum add_products(Sum s, Wide a, const Right& b) {
  if (kLow) {
    const __m256i low = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)),
                                          _mm256_cvtepi8_epi16(_mm256_castsi256_si128(b.b)));
    const __m256i high = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1)),
                                           _mm256_cvtepi8_epi16(_mm256_extracti128_si256(b.b, 1)));
    return _mm256_add_epi32(s, _mm256_add_epi32(low, high));
  }
  const __m256i pairs = _mm256_maddubs_epi16(b.size, _mm256_sign_epi8(a, b.b));
  return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
FASTLM_INLINE void totals(const Sum* s, const RowInfo&, int32_t* out) {
  const __m256i x = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
FASTLM_INLINE RowInfo row_info(const int8_t* a, int64_t k) {
  const __m256i least = _mm256_set1_epi8(-128);
  __m256i found = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += 32) {
    const Wide x = wide_load_part(a + i, k - i < 32 ? static_cast<int>(k - i) : 32);
    found = _mm256_or_si256(found, _mm256_cmpeq_epi8(x, least));
  }
  return {0, _mm256_movemask_epi8(found) != 0};
}
#else
constexpr int kWide = 16;
struct Wide {
  int8_t v[kWide];
};
struct Sum {
  int32_t v;
};
FASTLM_INLINE Wide wide_load_part(const int8_t* p, int n) {
  Wide w = {};
  memcpy(w.v, p, static_cast<size_t>(n < kWide ? n : kWide));
  return w;
}
FASTLM_INLINE Wide wide_load(const int8_t* p) { return wide_load_part(p, kWide); }
FASTLM_INLINE Sum sum_zero() { return {0}; }
struct Right {
  Wide b;
};
FASTLM_INLINE Right right_of(const Wide& b) { return {b}; }
template <bool kLow>
FASTLM_INLINE Sum add_products(Sum s, const Wide& a, const Right& b) {
  for (int i = 0; i < kWide; ++i) s.v += a.v[i] * b.b.v[i];
  return s;
}
FASTLM_INLINE void totals(const Sum* s, const RowInfo&, int32_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = s[i].v;
}
FASTLM_INLINE RowInfo row_info(const int8_t*, int64_t) { return {0, false}; }
#endif

// Sixteen int8 and sixteen int32 as floats; the latter rounded to nearest.
FASTLM_INLINE Vec int8_to_float(const int8_t* p) {
#if FASTLM_ISA_avx512
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif FASTLM_ISA_avx2
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(p[i]);
  return load(lanes);
#endif
}
FASTLM_INLINE Vec int32_to_float(const int32_t* p) {
#if FASTLM_ISA_avx512
  return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))};
#elif FASTLM_ISA_avx2
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(q)), _mm256_cvtepi32_ps(_mm256_loadu_si256(q + 1))};
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(p[i]);
  return load(lanes);
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
