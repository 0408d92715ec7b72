// Philox as Python's tests call it, to hold csrc/common/philox.h to the published vectors.
#include "common/philox.h"
#include "fastlm.h"

namespace fastlm {
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const philox::Words out = philox::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {out.w[0], out.w[1], out.w[2], out.w[3]};
}
}  // namespace fastlm
