// A copy with non-temporal stores: what memory bandwidth allows at most, for the benchmarks' ceilings.
#include <cstdint>
#include <cstring>
#if defined(FASTLM_ISA_avx2) || defined(FASTLM_ISA_avx512)
#include <immintrin.h>
#endif

namespace fastlm {
namespace FASTLM_ISA {
namespace {
void copy_range(const char* from, char* to, int64_t count) {
#if defined(FASTLM_ISA_avx512)
  while (count > 0 && (reinterpret_cast<uintptr_t>(to) & 63) != 0) *to++ = *from++, --count;
  for (; count >= 256; count -= 256, from += 256, to += 256) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
    const __m512i c = _mm512_loadu_si512(from + 128), d = _mm512_loadu_si512(from + 192);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 64), b);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 128), c);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 192), d);
  }
  _mm_sfence();
#elif defined(FASTLM_ISA_avx2)
  while (count > 0 && (reinterpret_cast<uintptr_t>(to) & 31) != 0) *to++ = *from++, --count;
  for (; count >= 64; count -= 64, from += 64, to += 64) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), b);
  }
  _mm_sfence();
#endif
  std::memcpy(to, from, static_cast<size_t>(count));
}
}  // namespace

void copy_nontemporal(const void* from, void* to, int64_t bytes, int threads) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const int64_t part = (bytes / threads + 64) / 64 * 64;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = t * part, end = begin + part < bytes ? begin + part : bytes;
    if (begin < end) copy_range(source + begin, target + begin, end - begin);
  }
}
}  // namespace FASTLM_ISA
}  // namespace fastlm
