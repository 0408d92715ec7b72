// How a line becomes 8-bit numbers: its largest magnitude, its scale, and the rounding. Shared by quantize_int8 and
// dropout_add_norm, whose bits are the same.
//
// A maximum of magnitudes is one of their bits as integers, where a NaN is above all. Division and rounding are the
// processor's, correctly rounded: the same bits on every instruction set.
#pragma once
#include "cpu/attention_simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr float kLeast = 0x1p-126f;

// The lanewise larger one of two vectors without signs, by their bits.
FASTLM_INLINE Vec larger_bits(Vec x, Vec y) {
#if FASTLM_ISA_avx512
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(x.v), _mm512_castps_si512(y.v)))};
#elif FASTLM_ISA_avx2
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x.a), _mm256_castps_si256(y.a))),
          _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x.b), _mm256_castps_si256(y.b)))};
#else
  int32_t a[kLanes], b[kLanes];
  memcpy(a, &x, sizeof a);
  memcpy(b, &y, sizeof b);
  for (int i = 0; i < kLanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
  Vec z;
  memcpy(&z, a, sizeof a);
  return z;
#endif
}
FASTLM_INLINE Vec without_sign(Vec x) {
#if FASTLM_ISA_avx512 || FASTLM_ISA_avx2
  return absolute(x);
#else
  uint32_t a[kLanes];
  memcpy(a, &x, sizeof a);
  for (int i = 0; i < kLanes; ++i) a[i] &= 0x7FFFFFFFu;
  memcpy(&x, a, sizeof a);
  return x;
#endif
}
FASTLM_INLINE float largest_bits(Vec x) {
  int32_t a[kLanes];
  memcpy(a, &x, sizeof a);
  int32_t most = a[0];
  for (int i = 1; i < kLanes; ++i) most = a[i] > most ? a[i] : most;
  float f;
  memcpy(&f, &most, sizeof f);
  return f;
}

// The scale of a largest magnitude; NaN for an infinity or a NaN.
FASTLM_INLINE float scale_of(float most) {
  const float scale = most / 127.0f;
  if (!(most <= 3.402823466e38f)) return __builtin_nanf("");
  return scale < kLeast ? 0.0f : scale;
}

// Sixteen values to int8: to nearest, ties to even, or up by chance where `units` in [0, 1) are added first.
FASTLM_INLINE void rounded(Vec x, Vec scale, const float* units, int8_t* q) {
  Vec r = divide(x, scale);
  if (units) {
    r = r + load(units);
#if FASTLM_ISA_avx512
    r = {_mm512_roundscale_ps(r.v, 9)};
#elif FASTLM_ISA_avx2
    r = {_mm256_floor_ps(r.a), _mm256_floor_ps(r.b)};
#else
    float lanes[kLanes];
    store(lanes, r);
    for (int i = 0; i < kLanes; ++i) lanes[i] = __builtin_floorf(lanes[i]);
    r = load(lanes);
#endif
  }
  r = minimum(maximum(r, set1(-127.0f)), set1(127.0f));
#if FASTLM_ISA_avx512
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(r.v)));
#elif FASTLM_ISA_avx2
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(r.a), _mm256_cvtps_epi32(r.b));
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q),
                   _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
#else
  float lanes[kLanes];
  store(lanes, r);
  // Adding and taking off 1.5 * 2^23 rounds to nearest, ties to even.
  for (int i = 0; i < kLanes; ++i) q[i] = static_cast<int8_t>((lanes[i] + 12582912.0f) - 12582912.0f);
#endif
}

FASTLM_INLINE bool live(float scale) { return scale > 0.0f; }  // neither 0 nor NaN

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
