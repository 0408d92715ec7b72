// Vector functions of attention on top of simd.h: fused multiply-add, maximum, selection by bits, exp2, tanh, and
// loads and stores of any dtype and stride.
//
// exp2 is a polynomial of degree 6 on [-1/2, 1/2], relative error below 2e-9 before rounding, within 1.5 ulp after;
// results below 2^-126 are 0, NaN stays NaN. exp multiplies by log2(e) in two floats and takes the whole part off
// exactly (with fma; the portable path rounds the product first), so the error does not grow with the exponent. tanh is
// within 3 ulp.
#pragma once
#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/simd.h"
#include "fastlm.h"

namespace fastlm {
namespace FASTLM_ISA {

#define FASTLM_NOINLINE static __attribute__((noinline))

constexpr double kLog2e = 1.44269504088896340736;

#if FASTLM_ISA_avx512
FASTLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTLM_INLINE Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTLM_INLINE Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTLM_INLINE Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTLM_INLINE Vec absolute(Vec a) { return {_mm512_abs_ps(a.v)}; }
// a where the bit is set, b elsewhere
FASTLM_INLINE Vec select(uint32_t bits, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)};
}
// the larger where the bit is set, a elsewhere; where one of the two is NaN, maximum and minimum give the second
FASTLM_INLINE Vec maximum_where(uint32_t bits, Vec a, Vec b) {
  return {_mm512_mask_max_ps(a.v, static_cast<__mmask16>(bits), a.v, b.v)};
}
FASTLM_INLINE uint32_t less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
FASTLM_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
FASTLM_INLINE float total(Vec a) { return _mm512_reduce_add_ps(a.v); }
#else
#if FASTLM_ISA_avx2
#define FASTLM_EACH(a256, a128) {a256(x.a, y.a), a256(x.b, y.b)}
FASTLM_INLINE Vec fma(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
FASTLM_INLINE Vec maximum(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
FASTLM_INLINE Vec minimum(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
FASTLM_INLINE Vec divide(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
FASTLM_INLINE Vec absolute(Vec x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
FASTLM_INLINE Vec select(uint32_t bits, Vec x, Vec y) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i low = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  const __m256i high = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits >> 8)), lane), lane);
  return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(low)), _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(high))};
}
FASTLM_INLINE uint32_t less(Vec x, Vec y) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))) << 8;
}
#else
FASTLM_INLINE Vec fma(Vec x, Vec y, Vec z) { return x * y + z; }
FASTLM_INLINE Vec maximum(Vec x, Vec y) {
  return {x.a > y.a ? x.a : y.a, x.b > y.b ? x.b : y.b, x.c > y.c ? x.c : y.c, x.d > y.d ? x.d : y.d};
}
FASTLM_INLINE Vec minimum(Vec x, Vec y) {
  return {x.a < y.a ? x.a : y.a, x.b < y.b ? x.b : y.b, x.c < y.c ? x.c : y.c, x.d < y.d ? x.d : y.d};
}
FASTLM_INLINE Vec divide(Vec x, Vec y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
FASTLM_INLINE Vec absolute(Vec x) { return maximum(x, zero() - x); }
FASTLM_INLINE Vec select(uint32_t bits, Vec x, Vec y) {
  float a[16], b[16];
  store(a, x);
  store(b, y);
  for (int i = 0; i < 16; ++i) b[i] = (bits >> i) & 1 ? a[i] : b[i];
  return load(b);
}
FASTLM_INLINE uint32_t less(Vec x, Vec y) {
  float a[16], b[16];
  store(a, x);
  store(b, y);
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a[i] < b[i]) << i;
  return bits;
}
#endif
FASTLM_INLINE float largest(Vec x) {
  float a[16];
  store(a, x);
  for (int step = 8; step > 0; step >>= 1) {
    for (int i = 0; i < step; ++i) a[i] = a[i] > a[i + step] ? a[i] : a[i + step];
  }
  return a[0];
}
FASTLM_INLINE float total(Vec x) { return sum(x); }
FASTLM_INLINE Vec maximum_where(uint32_t bits, Vec a, Vec b) { return maximum(a, select(bits, b, a)); }
#endif

FASTLM_INLINE float first_lane(Vec x) {
  float lanes[16];
  store(lanes, x);
  return lanes[0];
}
FASTLM_INLINE void store_bf16(void* p, Vec x) {
#if FASTLM_ISA_avx512
  _mm256_storeu_si256(static_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
#else
  BF16::store(p, BF16::round(x));
#endif
}
FASTLM_INLINE int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

FASTLM_INLINE Vec exp2_polynomial(Vec f) {
  Vec p = fma(set1(0x1.41fbbcp-13f), f, set1(0x1.5f3e54p-10f));
  p = fma(p, f, set1(0x1.3b2d4cp-7f));
  p = fma(p, f, set1(0x1.c6aee8p-5f));
  p = fma(p, f, set1(0x1.ebfbdcp-3f));
  p = fma(p, f, set1(0x1.62e430p-1f));
  return fma(p, f, set1(1.0f));
}

// A factor as the sum of two floats.
struct Factor {
  float high, low;
  FASTLM_INLINE Factor of(double x) {
    const float high = static_cast<float>(x);
    return {high, static_cast<float>(x - high)};
  }
};

// 2^(x * high + rest) for exponents up to 127; 0 below -126 and for -inf. `rest`, far below 1, is what x * high lacks.
FASTLM_INLINE Vec exp2_of(Vec x, Vec high, Vec rest) {
  const Vec y = x * high;
#if FASTLM_ISA_avx512
  const __mmask16 live = _mm512_cmp_ps_mask(y.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(y.v, 8);
  const Vec f = {_mm512_fmsub_ps(x.v, high.v, n)};
  return {_mm512_maskz_scalef_ps(live, exp2_polynomial(f + rest).v, n)};
#else
  const uint32_t dead = less(y, set1(-126.0f));
  const Vec magic = set1(12582912.0f), shifted = maximum(y, set1(-126.0f)) + magic, n = shifted - magic;
  const Vec p = exp2_polynomial(fma(x, high, zero() - n) + rest);
  int32_t whole[16], bits[16];
  memcpy(whole, &shifted, sizeof whole);
  for (int i = 0; i < 16; ++i) {  // 2^n: a product, unlike a sum of exponents, leaves a NaN a NaN
    bits[i] = static_cast<int32_t>((static_cast<uint32_t>(whole[i]) + 127u) << 23);
  }
  Vec power;
  memcpy(&power, bits, sizeof bits);
  return select(dead, zero(), p * power);
#endif
}
// e^(x * factor)
FASTLM_INLINE Vec exp_of(Vec x, Factor log2) { return exp2_of(x, set1(log2.high), x * set1(log2.low)); }

FASTLM_INLINE Vec tanh(Vec x) {
  const Vec size = absolute(x), z = x * x;
  Vec p = fma(set1(-5.70498872745e-3f), z, set1(2.06390887954e-2f));  // Cephes, for |x| < 0.625
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  const Vec e = exp_of(size, Factor::of(-2.0 * kLog2e));
  const Vec one = set1(1.0f), large = divide(one - e, one + e);
  return select(less(size, set1(0.625f)), small, select(less(x, zero()), zero() - large, large));
}

// --- any dtype, any stride ---
FASTLM_INLINE int size_of(int64_t dtype) { return dtype == kFloat32 ? 4 : dtype == kBool ? 1 : 2; }
FASTLM_INLINE Vec load_part(const void* p, int64_t dtype, int n) {
  if (dtype == kFloat32) return n >= 16 ? F32::load(p) : F32::load_part(p, n);
  if (dtype == kBFloat16) return n >= 16 ? BF16::load(p) : BF16::load_part(p, n);
  return n >= 16 ? F16::load(p) : F16::load_part(p, n);
}
// n elements (at most 16 count) from p on, the rest 0
FASTLM_INLINE Vec load_strided(const char* p, int64_t dtype, int64_t stride, int n) {
  if (stride == 1) return load_part(p, dtype, n);
  if (n > 16) n = 16;
  if (dtype == kFloat32) {
    float lanes[16] = {};
    for (int i = 0; i < n; ++i) memcpy(&lanes[i], p + 4 * stride * i, 4);
    return load(lanes);
  }
  uint16_t lanes[16] = {};
  for (int i = 0; i < n; ++i) memcpy(&lanes[i], p + 2 * stride * i, 2);
  return load_part(lanes, dtype, 16);
}
FASTLM_INLINE void store_strided(char* p, int64_t dtype, int64_t stride, Vec x, int n) {
  if (n > 16) n = 16;
  char lanes[64];
  char* to = stride == 1 && n == 16 ? p : lanes;
  if (dtype == kFloat32) {
    F32::store(to, x);
  } else if (dtype == kBFloat16) {
    BF16::store(to, BF16::round(x));
  } else {
    F16::store(to, F16::round(x));
  }
  if (to == p) return;
  const int size = size_of(dtype);
  if (stride == 1) {
    memcpy(p, lanes, static_cast<size_t>(n * size));
  } else {
    for (int i = 0; i < n; ++i) memcpy(p + stride * i * size, lanes + i * size, static_cast<size_t>(size));
  }
}
// A row of n floats times `factor`, as dtype
FASTLM_INLINE void store_row(char* p, int64_t dtype, int64_t stride, const float* row, float factor, int n) {
  const Vec f = set1(factor);
  for (int c = 0; c < n; c += 16) {
    store_strided(p + c * stride * size_of(dtype), dtype, stride, load(row + c) * f, n - c);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
