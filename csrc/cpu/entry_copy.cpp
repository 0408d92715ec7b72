// The border of copy_nontemporal: checks and the choice of instruction set.
#include <stdexcept>

#include "cpu/dispatch.h"
#include "fastlm.h"

namespace fastlm {
FASTLM_DECLARE(void, copy_nontemporal, (const void*, void*, int64_t, int))

void copy_nontemporal(uintptr_t from, uintptr_t to, int64_t bytes, int threads) {
  if (from == 0 || to == 0 || bytes < 0 || threads < 1) {
    throw std::invalid_argument("copy_nontemporal: needs two addresses, a size of at least 0 and at least one thread");
  }
  FASTLM_DISPATCH(copy_nontemporal, reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), bytes, threads);
}
}  // namespace fastlm
