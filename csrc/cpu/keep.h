// Dropout decisions on sixteen lanes (simd.h): Philox for a row, and Keep, which decides 128 columns, eight a Philox
// call.
#pragma once
#include "common/philox.h"
#include "cpu/simd.h"

namespace fastlm {
namespace FASTLM_ISA {

// Philox4x32-7 with the counter (chunk, row low, row high, 0). Of the first three rounds, what depends on the row alone
// is worked out once a row; `key` holds both words of every round.
struct Philox {
  uint32_t key0[philox::kRounds], key1[philox::kRounds];
  uint32_t after1, after2, after3;  // constants of the row that enter words 0 and 2 after rounds 2, 2 and 3

  FASTLM_INLINE Philox make(uint64_t key) {
    Philox p;
    for (int i = 0; i < philox::kRounds; ++i) {
      p.key0[i] = static_cast<uint32_t>(key) + i * philox::kWeyl0;
      p.key1[i] = static_cast<uint32_t>(key >> 32) + i * philox::kWeyl1;
    }
    p.after1 = p.after2 = p.after3 = 0;
    return p;
  }
  inline __attribute__((always_inline)) void set_row(uint64_t row) {
    const uint64_t product1 = static_cast<uint64_t>(philox::kMultiplier1) * static_cast<uint32_t>(row >> 32);
    const uint32_t word0 = static_cast<uint32_t>(product1 >> 32) ^ static_cast<uint32_t>(row) ^ key0[0];
    const uint64_t product0 = static_cast<uint64_t>(philox::kMultiplier0) * word0;
    after1 = static_cast<uint32_t>(product1) ^ key0[1];
    after2 = static_cast<uint32_t>(product0 >> 32) ^ key1[1];
    after3 = static_cast<uint32_t>(product0) ^ key1[2];
  }
};

// The decisions of 128 columns, from sixteen calls. A word lives in the low half of a 64-bit lane, where the multiplier
// wants it and leaves both halves of the product; what is in the high half never matters. The chunks are dealt to the
// lanes such that pairing the words (0,1) and (2,3) and then interleaving the pairs puts all elements in order.
struct Keep {
#if FASTLM_ISA_avx512
  uint32_t bits[4];
  FASTLM_INLINE __m512i xor3(__m512i a, __m512i b, uint32_t c) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32(static_cast<int>(c)), 0x96);
  }
  inline __attribute__((always_inline)) void draw(const Philox& p, int64_t chunk, uint32_t threshold) {
    const __m512i m0 = _mm512_set1_epi64(philox::kMultiplier0), m1 = _mm512_set1_epi64(philox::kMultiplier1);
    const __m512i limit = _mm512_set1_epi16(static_cast<short>(threshold));
    for (int half = 0; half < 2; ++half) {
      const __m512i c =
          _mm512_add_epi64(_mm512_set1_epi64(chunk + 8 * half), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
      const __m512i w3 = _mm512_mul_epu32(c, m0);  // round 1
      const __m512i w2 = _mm512_xor_si512(_mm512_srli_epi64(w3, 32), _mm512_set1_epi32(static_cast<int>(p.key1[0])));
      __m512i b1 = _mm512_mul_epu32(w2, m1);  // round 2
      __m512i b0 = _mm512_xor_si512(_mm512_srli_epi64(b1, 32), _mm512_set1_epi32(static_cast<int>(p.after1)));
      __m512i b2 = _mm512_xor_si512(w3, _mm512_set1_epi32(static_cast<int>(p.after2)));
      __m512i b3 = _mm512_mul_epu32(b0, m0);  // round 3
      const __m512i c1 = _mm512_mul_epu32(b2, m1);
      b0 = xor3(_mm512_srli_epi64(c1, 32), b1, p.key0[2]);
      b2 = _mm512_xor_si512(_mm512_srli_epi64(b3, 32), _mm512_set1_epi32(static_cast<int>(p.after3)));
      b1 = c1;
#pragma GCC unroll 4
      for (int i = 3; i < philox::kRounds; ++i) {
        const __m512i low0 = _mm512_mul_epu32(b0, m0), low1 = _mm512_mul_epu32(b2, m1);
        b0 = xor3(_mm512_srli_epi64(low1, 32), b1, p.key0[i]);
        b2 = xor3(_mm512_srli_epi64(low0, 32), b3, p.key1[i]);
        b1 = low1;
        b3 = low0;
      }
      const __m512i first = _mm512_mask_shuffle_epi32(b0, 0xAAAA, b1, _MM_PERM_CCAA);
      const __m512i second = _mm512_mask_shuffle_epi32(b2, 0xAAAA, b3, _MM_PERM_CCAA);
      bits[2 * half] = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(first, second), limit);
      bits[2 * half + 1] = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(first, second), limit);
    }
  }
  // x in the lanes that are kept, 0 elsewhere, of columns 16k to 16k+15.
  inline __attribute__((always_inline)) Vec choose(int k, Vec x) const {
    return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits[k >> 1] >> (16 * (k & 1))), x.v)};
  }
#elif FASTLM_ISA_avx2
  __m256i words[8];
  FASTLM_INLINE __m256i xor2(__m256i a, uint32_t b) {
    return _mm256_xor_si256(a, _mm256_set1_epi32(static_cast<int>(b)));
  }
  inline __attribute__((always_inline)) void draw(const Philox& p, int64_t chunk, uint32_t threshold) {
    const __m256i m0 = _mm256_set1_epi64x(philox::kMultiplier0), m1 = _mm256_set1_epi64x(philox::kMultiplier1);
    const __m256i limit = _mm256_set1_epi16(static_cast<short>(threshold));
    for (int part = 0; part < 4; ++part) {
      const __m256i c = _mm256_add_epi64(_mm256_set1_epi64x(chunk + 4 * part), _mm256_setr_epi64x(0, 2, 1, 3));
      const __m256i w3 = _mm256_mul_epu32(c, m0);  // round 1
      const __m256i w2 = xor2(_mm256_srli_epi64(w3, 32), p.key1[0]);
      __m256i b1 = _mm256_mul_epu32(w2, m1);  // round 2
      __m256i b0 = xor2(_mm256_srli_epi64(b1, 32), p.after1);
      __m256i b2 = xor2(w3, p.after2);
      __m256i b3 = _mm256_mul_epu32(b0, m0);  // round 3
      const __m256i c1 = _mm256_mul_epu32(b2, m1);
      b0 = _mm256_xor_si256(_mm256_srli_epi64(c1, 32), xor2(b1, p.key0[2]));
      b2 = xor2(_mm256_srli_epi64(b3, 32), p.after3);
      b1 = c1;
#pragma GCC unroll 4
      for (int i = 3; i < philox::kRounds; ++i) {
        const __m256i low0 = _mm256_mul_epu32(b0, m0), low1 = _mm256_mul_epu32(b2, m1);
        b0 = _mm256_xor_si256(_mm256_srli_epi64(low1, 32), xor2(b1, p.key0[i]));
        b2 = _mm256_xor_si256(_mm256_srli_epi64(low0, 32), xor2(b3, p.key1[i]));
        b1 = low1;
        b3 = low0;
      }
      const __m256i first = _mm256_blend_epi32(b0, _mm256_slli_epi64(b1, 32), 0xAA);
      const __m256i second = _mm256_blend_epi32(b2, _mm256_slli_epi64(b3, 32), 0xAA);
      const __m256i low = _mm256_unpacklo_epi64(first, second), high = _mm256_unpackhi_epi64(first, second);
      words[2 * part] = _mm256_cmpeq_epi16(_mm256_max_epu16(low, limit), low);
      words[2 * part + 1] = _mm256_cmpeq_epi16(_mm256_max_epu16(high, limit), high);
    }
  }
  inline __attribute__((always_inline)) Vec choose(int k, Vec x) const {
    const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(words[k]));
    const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(words[k], 1));
    return {_mm256_and_ps(x.a, _mm256_castsi256_ps(low)), _mm256_and_ps(x.b, _mm256_castsi256_ps(high))};
  }
#else
  uint32_t masks[128];
  inline __attribute__((always_inline)) void draw(const Philox& p, int64_t chunk, uint32_t threshold) {
    uint32_t w0[16], w1[16], w2[16], w3[16];
    for (int i = 0; i < 16; ++i) {  // rounds 1 and 2
      const uint64_t a = static_cast<uint64_t>(philox::kMultiplier0) * static_cast<uint32_t>(chunk + i);
      const uint64_t b = static_cast<uint64_t>(philox::kMultiplier1) * (static_cast<uint32_t>(a >> 32) ^ p.key1[0]);
      w0[i] = static_cast<uint32_t>(b >> 32) ^ p.after1;
      w1[i] = static_cast<uint32_t>(b);
      w2[i] = static_cast<uint32_t>(a) ^ p.after2;
      w3[i] = p.after3 ^ p.key1[2];
    }
    for (int round = 2; round < philox::kRounds; ++round) {
      const uint32_t k0 = p.key0[round], k1 = p.key1[round];
      for (int i = 0; i < 16; ++i) {
        const uint64_t a = static_cast<uint64_t>(philox::kMultiplier0) * w0[i];
        const uint64_t b = static_cast<uint64_t>(philox::kMultiplier1) * w2[i];
        w0[i] = static_cast<uint32_t>(b >> 32) ^ w1[i] ^ k0;
        w1[i] = static_cast<uint32_t>(b);
        w2[i] = static_cast<uint32_t>(a >> 32) ^ w3[i] ^ k1;
        w3[i] = static_cast<uint32_t>(a);
      }
    }
    for (int i = 0; i < 16; ++i) {
      const uint32_t words[4] = {w0[i], w1[i], w2[i], w3[i]};
      for (int w = 0; w < 4; ++w) {
        masks[8 * i + 2 * w] = (words[w] & 0xFFFFu) >= threshold ? 0xFFFFFFFFu : 0u;
        masks[8 * i + 2 * w + 1] = (words[w] >> 16) >= threshold ? 0xFFFFFFFFu : 0u;
      }
    }
  }
  inline __attribute__((always_inline)) Vec choose(int k, Vec x) const {
    uint32_t lanes[kLanes];
    memcpy(lanes, &x, sizeof lanes);
    for (int i = 0; i < kLanes; ++i) lanes[i] &= masks[16 * k + i];
    memcpy(&x, lanes, sizeof lanes);
    return x;
  }
#endif
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
