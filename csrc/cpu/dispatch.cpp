// Picks the instruction set at run time and reports what this build is.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "fastlm.h"

namespace fastlm {
namespace {
struct Choice {
  Isa isa;
  std::string reason;
};

Isa best_of_processor(std::string& reason) {
#ifdef FASTLM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (avx512) return Isa::avx512;
  reason = avx2 ? "the processor lacks AVX-512 with VNNI and BF16" : "the processor lacks AVX2, FMA and F16C";
  return avx2 ? Isa::avx2 : Isa::portable;
#else
  reason = "this build is for a processor other than x86-64";
  return Isa::portable;
#endif
}

Choice choose() {
  Choice choice;
  choice.isa = best_of_processor(choice.reason);
  const char* cap = std::getenv("FASTLM_CPU_ISA");
  if (cap == nullptr || *cap == '\0') return choice;
  Isa wanted;
  if (std::strcmp(cap, "portable") == 0) {
    wanted = Isa::portable;
  } else if (std::strcmp(cap, "avx2") == 0) {
    wanted = Isa::avx2;
  } else if (std::strcmp(cap, "avx512") == 0) {
    wanted = Isa::avx512;
  } else if (std::strcmp(cap, "amx") == 0) {  // above the best there is, so it caps nothing
    choice.reason += std::string(choice.reason.empty() ? "" : "; ") + "this build has no AMX kernels yet";
    return choice;
  } else {
    throw std::invalid_argument(std::string("FASTLM_CPU_ISA is '") + cap +
                                "'; it must be portable, avx2, avx512 or amx");
  }
  if (wanted < choice.isa) choice = {wanted, std::string("capped by FASTLM_CPU_ISA=") + cap};
  return choice;
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}
}  // namespace

Isa isa() { return chosen().isa; }

std::string cpu_isa() {
  static const char* const names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(chosen().isa)];
}

std::string cpu_isa_reason() { return chosen().reason; }

#ifndef FASTLM_CUDA
std::string cuda_archs() { return ""; }
int cuda_device_count() { return 0; }
#endif
}  // namespace fastlm
