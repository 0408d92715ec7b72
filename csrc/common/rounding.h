// float32 to and from bfloat16 and float16 by bits, rounded to nearest even: the same values on a GPU (one instruction)
// and on a CPU (integer arithmetic). A NaN stays a NaN; its payload may differ.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/philox.h"  // FASTLM_HD

namespace fastlm {

FASTLM_HD float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

FASTLM_HD uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

FASTLM_HD float bfloat16_to_float(uint32_t bits) { return float_of_bits(bits << 16); }

FASTLM_HD float float16_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
#else
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7FFFu;
  if (rest >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));  // infinity, NaN
  // The exponent moves by 112 as a product, which also puts a subnormal right: no rounding is involved.
  return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 5.192296858534828e33f));  // 2^112
#endif
}

FASTLM_HD uint32_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

FASTLM_HD uint32_t float_to_float16(float value) {
  const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7FFFFFFFu;
  if (rest > 0x7F800000u) return 0x7FFFu;
  if (rest >= 0x47800000u) return sign | 0x7C00u;  // 65536 and above; 65520 rounds up to infinity below
  if (rest <
      0x38800000u) {  // below 2^-14 the unit is 2^-24: adding 0.5 rounds there, and leaves the bits at the bottom
    return sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3F000000u);
  }
  return sign | ((rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13);
}

// Two values in one word, the first one in the low half.
FASTLM_HD uint32_t bfloat16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return float_to_bfloat16(low) | (float_to_bfloat16(high) << 16);
#endif
}

FASTLM_HD uint32_t float16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return float_to_float16(low) | (float_to_float16(high) << 16);
#endif
}

}  // namespace fastlm
