// What the CUDA half of the build is, and whether a device is there. Without a driver the answer is 0, not an error.
#include <cuda_runtime.h>

#include "fastlm.h"

namespace fastlm {
std::string cuda_archs() { return FASTLM_CUDA_ARCHS; }

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver (35) or no device (100): clear it and say "none"
    return 0;
  }
  return count;
}
}  // namespace fastlm
