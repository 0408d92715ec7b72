// Sixteen float lanes, whatever the instruction set: one __m512, two __m256, or four 16-byte vectors of the compiler's.
// Kernels written over Vec add in the same order everywhere, and no function here contracts a*b+c, so every instruction
// set gives the same bits. No STL: a weak symbol compiled for AVX-512 could be picked by the linker for every machine.
//
//   Vec                 lanes; + - *, set1, zero, load, store, sum (a fixed tree)
//   F32, BF16, F16      a storage type: load, pack (sixteen values rounded to nearest, ties to even), unpack,
//                       store, stream (past the cache, aligned); *_part of the first n elements
#pragma once
#include <stdint.h>
#include <string.h>

#if FASTLM_ISA_avx2 || FASTLM_ISA_avx512
#include <immintrin.h>
#endif

#define FASTLM_INLINE static inline __attribute__((always_inline))

namespace fastlm {
namespace FASTLM_ISA {

constexpr int kLanes = 16;

#if FASTLM_ISA_avx512
struct Vec {
  __m512 v;
};
FASTLM_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
FASTLM_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTLM_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTLM_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTLM_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTLM_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FASTLM_INLINE Vec first(Vec a, int n) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1), a.v)}; }
FASTLM_INLINE void fold(Vec a, float* eight) {
  _mm256_storeu_ps(eight, _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
#elif FASTLM_ISA_avx2
struct Vec {
  __m256 a, b;
};
FASTLM_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FASTLM_INLINE Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
FASTLM_INLINE Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
FASTLM_INLINE Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
FASTLM_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FASTLM_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
FASTLM_INLINE Vec first(Vec x, int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane);
  return {_mm256_and_ps(x.a, _mm256_castsi256_ps(low)), _mm256_and_ps(x.b, _mm256_castsi256_ps(high))};
}
FASTLM_INLINE void fold(Vec x, float* eight) { _mm256_storeu_ps(eight, _mm256_add_ps(x.a, x.b)); }
#else
typedef float Four __attribute__((vector_size(16), may_alias, aligned(4)));
struct Vec {
  Four a, b, c, d;
};
FASTLM_INLINE Vec set1(float x) {
  const Four f = {x, x, x, x};
  return {f, f, f, f};
}
FASTLM_INLINE Vec operator+(Vec x, Vec y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
FASTLM_INLINE Vec operator-(Vec x, Vec y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
FASTLM_INLINE Vec operator*(Vec x, Vec y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
FASTLM_INLINE Vec load(const float* p) {
  const Four* f = reinterpret_cast<const Four*>(p);
  return {f[0], f[1], f[2], f[3]};
}
FASTLM_INLINE void store(float* p, Vec x) {
  Four* f = reinterpret_cast<Four*>(p);
  f[0] = x.a, f[1] = x.b, f[2] = x.c, f[3] = x.d;
}
FASTLM_INLINE Vec first(Vec x, int n) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = n; i < kLanes; ++i) lanes[i] = 0.0f;
  return load(lanes);
}
FASTLM_INLINE void fold(Vec x, float* eight) {
  const Four low = x.a + x.c, high = x.b + x.d;
  memcpy(eight, &low, 16);
  memcpy(eight + 4, &high, 16);
}
#endif

FASTLM_INLINE Vec zero() { return set1(0.0f); }
// The sum of the lanes: halves added to halves.
FASTLM_INLINE float sum(Vec x) {
  float s[8];
  fold(x, s);
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// --- storage types ---

struct F32 {
  typedef float Element;
  FASTLM_INLINE Vec load(const void* p) { return FASTLM_ISA::load(static_cast<const float*>(p)); }
  typedef Vec Packed;
  FASTLM_INLINE Vec pack(Vec x) { return x; }
  FASTLM_INLINE Vec unpack(Vec x) { return x; }
  FASTLM_INLINE Vec round(Vec x) { return x; }
  FASTLM_INLINE void store(void* p, Vec x) { FASTLM_ISA::store(static_cast<float*>(p), x); }
#if FASTLM_ISA_avx512
  FASTLM_INLINE Vec load_part(const void* p, int n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
  }
  FASTLM_INLINE void store_part(void* p, Vec x, int n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
  }
  FASTLM_INLINE void stream(void* p, Vec x) { _mm512_stream_ps(static_cast<float*>(p), x.v); }
#else
  FASTLM_INLINE Vec load_part(const void* p, int n) {
    float lanes[kLanes] = {};
    memcpy(lanes, p, n * sizeof(float));
    return FASTLM_ISA::load(lanes);
  }
  FASTLM_INLINE void store_part(void* p, Vec x, int n) {
    float lanes[kLanes];
    FASTLM_ISA::store(lanes, x);
    memcpy(p, lanes, n * sizeof(float));
  }
#if FASTLM_ISA_avx2
  FASTLM_INLINE void stream(void* p, Vec x) {
    _mm256_stream_ps(static_cast<float*>(p), x.a);
    _mm256_stream_ps(static_cast<float*>(p) + 8, x.b);
  }
#else
  FASTLM_INLINE void stream(void* p, Vec x) { store(p, x); }
#endif
#endif
};

// What the 16-bit types share. Packed is a __m256i, or sixteen uint16_t.
#if FASTLM_ISA_avx512 || FASTLM_ISA_avx2
typedef __m256i Sixteen;
#else
struct Sixteen {
  uint16_t h[kLanes];
};
#endif
template <class T>
struct Half {
  typedef uint16_t Element;
  typedef Sixteen Packed;
  FASTLM_INLINE Vec load(const void* p) {
    Sixteen x;
    memcpy(&x, p, sizeof x);
    return T::unpack(x);
  }
  FASTLM_INLINE void store(void* p, Sixteen x) { memcpy(p, &x, sizeof x); }
  FASTLM_INLINE void store(void* p, Vec x) { store(p, T::pack(x)); }
  FASTLM_INLINE Vec round(Vec x) { return T::unpack(T::pack(x)); }
#if FASTLM_ISA_avx512
  FASTLM_INLINE Vec load_part(const void* p, int n) {
    return T::unpack(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
  }
  FASTLM_INLINE void store_part(void* p, Sixteen x, int n) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), x);
  }
#else
  FASTLM_INLINE Vec load_part(const void* p, int n) {
    uint16_t lanes[kLanes] = {};
    memcpy(lanes, p, n * sizeof(uint16_t));
    return load(lanes);
  }
  FASTLM_INLINE void store_part(void* p, Sixteen x, int n) { memcpy(p, &x, n * sizeof(uint16_t)); }
#endif
#if FASTLM_ISA_avx512 || FASTLM_ISA_avx2
  FASTLM_INLINE void stream(void* p, Sixteen x) { _mm256_stream_si256(static_cast<__m256i*>(p), x); }
#else
  FASTLM_INLINE void stream(void* p, Sixteen x) { store(p, x); }
#endif
};

// A NaN stays one: its upper bits, made quiet.
#if FASTLM_ISA_avx512
struct BF16 : Half<BF16> {
  FASTLM_INLINE Vec unpack(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
  FASTLM_INLINE __m256i pack(Vec x) {
    // The instruction takes subnormals for zero; they are rare enough for a branch.
    if (__builtin_expect(_mm512_fpclass_ps_mask(x.v, 0x20) != 0, 0)) return pack_any(x);
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
  }
  static __attribute__((noinline)) __m256i pack_any(Vec x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
  }
};
struct F16 : Half<F16> {
  FASTLM_INLINE Vec unpack(__m256i x) { return {_mm512_cvtph_ps(x)}; }
  FASTLM_INLINE __m256i pack(Vec x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};
#elif FASTLM_ISA_avx2
struct BF16 : Half<BF16> {
  FASTLM_INLINE Vec unpack(__m256i x) {
    const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(x));
    const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
  }
  FASTLM_INLINE __m256i round8(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256 chosen =
        _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
  }
  FASTLM_INLINE __m256i pack(Vec x) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(round8(x.a), round8(x.b)), 0xD8);
  }
};
struct F16 : Half<F16> {
  FASTLM_INLINE Vec unpack(__m256i x) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  }
  FASTLM_INLINE __m256i pack(Vec x) {
    const __m128i low = _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i high = _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
};
#else
FASTLM_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
FASTLM_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// IEEE half to float: the exponent rebased by a multiplication, which also normalises subnormals.
FASTLM_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  const float x = float_of(rest) * float_of(0x77800000u);  // 2^112
  const uint32_t bits = (h & 0x7C00u) == 0x7C00u ? (rest | 0x7F800000u) : bits_of(x);
  return float_of(bits | sign);
}
FASTLM_INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65536 and above
  if (magnitude < 0x38800000u) {                                               // subnormal: let the adder round
    const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + odd) >> 13));
}
struct BF16 : Half<BF16> {
  FASTLM_INLINE Vec unpack(Sixteen x) {
    uint32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint32_t>(x.h[i]) << 16;
    Vec v;
    memcpy(&v, lanes, sizeof v);
    return v;
  }
  FASTLM_INLINE Sixteen pack(Vec x) {
    uint32_t lanes[kLanes];
    Sixteen out;
    memcpy(lanes, &x, sizeof lanes);
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t bits = lanes[i], up = bits + 0x7FFFu + ((bits >> 16) & 1u);
      out.h[i] = static_cast<uint16_t>(((bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x00400000u : up) >> 16);
    }
    return out;
  }
};
struct F16 : Half<F16> {
  FASTLM_INLINE Vec unpack(Sixteen x) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = half_to_float(x.h[i]);
    return FASTLM_ISA::load(lanes);
  }
  FASTLM_INLINE Sixteen pack(Vec x) {
    float lanes[kLanes];
    Sixteen out;
    FASTLM_ISA::store(lanes, x);
    for (int i = 0; i < kLanes; ++i) out.h[i] = float_to_half(lanes[i]);
    return out;
  }
};
#endif

// Asks for the cache line at p, which need not be mapped.
FASTLM_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
