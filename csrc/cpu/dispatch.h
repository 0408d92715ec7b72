// Which instruction set runs: the best one the processor and the build have, capped by FASTLM_CPU_ISA.
#pragma once

namespace fastlm {
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };
Isa isa();  // read once per process
}  // namespace fastlm

// Declares fastlm::<isa>::function for every instruction set of the build.
#ifdef FASTLM_X86
#define FASTLM_DECLARE(result, function, arguments) \
  namespace portable {                              \
  result function arguments;                        \
  }                                                 \
  namespace avx2 {                                  \
  result function arguments;                        \
  }                                                 \
  namespace avx512 {                                \
  result function arguments;                        \
  }
#else
#define FASTLM_DECLARE(result, function, arguments) \
  namespace portable {                              \
  result function arguments;                        \
  }
#endif

// Calls fastlm::<isa>::function(args...) for the instruction set in use.
#ifdef FASTLM_X86
#define FASTLM_DISPATCH(function, ...)                  \
  switch (::fastlm::isa()) {                            \
    case ::fastlm::Isa::avx512:                         \
      return ::fastlm::avx512::function(__VA_ARGS__);   \
    case ::fastlm::Isa::avx2:                           \
      return ::fastlm::avx2::function(__VA_ARGS__);     \
    default:                                            \
      return ::fastlm::portable::function(__VA_ARGS__); \
  }
#else
#define FASTLM_DISPATCH(function, ...) return ::fastlm::portable::function(__VA_ARGS__)
#endif
