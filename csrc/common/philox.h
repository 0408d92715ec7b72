// Philox4x32 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), 7 rounds, and what
// fastlm makes of it: sixteen random bits an element, eight elements a call. Shared by CPU and CUDA; its twins are
// python/fastlm/reference/philox.py and kernels/philox.py. All are held to the published known-answer vectors.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTLM_HD __host__ __device__ __forceinline__
#else
#define FASTLM_HD inline __attribute__((always_inline))
#endif

namespace fastlm {
namespace philox {

constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// XORed into the seed, so that two ops given the same seed draw unrelated masks.
constexpr uint64_t kKeyDropoutAddNorm = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kKeyAttention = 0xD1B54A32D192ED03ull;
constexpr uint64_t kKeyQuantizeInt8 = 0x8CB92BA72F3D8DD7ull;

struct Words {
  uint32_t w[4];
};

FASTLM_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

FASTLM_HD Words philox4x32(Words c, uint32_t key0, uint32_t key1) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t high0 = multiply_high(kMultiplier0, c.w[0]), low0 = kMultiplier0 * c.w[0];
    const uint32_t high1 = multiply_high(kMultiplier1, c.w[2]), low1 = kMultiplier1 * c.w[2];
    c.w[0] = high1 ^ c.w[1] ^ key0;
    c.w[1] = low1;
    c.w[2] = high0 ^ c.w[3] ^ key1;
    c.w[3] = low0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

// Element 8c + 2w + h of a row takes bits 16h..16h+15 of word w of the call with chunk c.
FASTLM_HD uint32_t bits_of(const Words& words, int element) {
  return (words.w[(element >> 1) & 3] >> (16 * (element & 1))) & 0xFFFFu;
}

// Elements whose bits are below the threshold are dropped; p is served in steps of 2^-16, and never all are dropped.
// nearbyint rounds half to even, as Python's round does.
inline uint32_t threshold_of(double p) {
  const double t = std::nearbyint(p * 65536.0);
  return t > 65535.0 ? 65535u : static_cast<uint32_t>(t);
}

// What survivors are multiplied by: the inverse of the exact keep-probability.
inline float keep_scale(uint32_t threshold) {
  return static_cast<float>(65536.0 / (65536.0 - static_cast<double>(threshold)));
}

}  // namespace philox
}  // namespace fastlm
