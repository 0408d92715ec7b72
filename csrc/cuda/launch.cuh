// What every CUDA launcher shares: checked runtime calls, the device set and restored, one way to launch, and the few
// device primitives that differ by architecture. tests/cuda_emulation/ stands in for the CUDA headers on a host
// compiler.
#pragma once
#ifdef FASTLM_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define FASTLM_DEVICE __device__ __forceinline__
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastlm.h"

namespace fastlm {
namespace cuda {

inline void check(cudaError_t error, const char* doing, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be found again by whoever calls CUDA next
  throw std::runtime_error("fastlm: " + std::string(doing) + " on cuda:" + std::to_string(device) +
                           " failed: " + cudaGetErrorString(error));
}

// Makes `device` current and puts back what was current before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "reading the current device", device);
    if (before_ != device) check(cudaSetDevice(device), "selecting the device", device);
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

struct Grid {
  int64_t blocks_x = 1, blocks_y = 1;
  int threads = 32;
  int64_t shared_bytes = 0;
  int cluster = 1;  // thread blocks of x per cluster
};

// Launches a kernel that takes one struct. Never synchronises; may be captured into a graph.
template <class Params>
void launch(void (*kernel)(Params), const Params& params, const Grid& grid, int device, uintptr_t stream,
            const char* doing) {
  if (grid.blocks_x == 0 || grid.blocks_y == 0) return;
  if (grid.blocks_x > 0x7FFFFFFF) {
    throw std::invalid_argument(std::string("fastlm: ") + doing + ": too many rows for one launch");
  }
  if (grid.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          doing, device);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks_x), static_cast<unsigned>(grid.blocks_y), 1);
  config.blockDim = dim3(static_cast<unsigned>(grid.threads), 1, 1);
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  if (grid.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, params), doing, device);
}

// Whether `kernel` may run in clusters here: a chip that has them, and code compiled for one (not PTX of an older one).
inline bool has_clusters(const void* kernel, int device) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "reading the capability", device);
  if (major < 9) return false;
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, kernel), "reading a kernel's attributes", device);
  return attributes.ptxVersion >= 90;
}

// --- device ---
FASTLM_DEVICE float warp_sum(float value) {  // every lane gets the same bits: each step adds the same two numbers
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  return value;
}

#ifndef FASTLM_EMULATION
FASTLM_DEVICE float* shared_memory() {  // the block's dynamic shared memory
  extern __shared__ float4 fastlm_shared[];
  return reinterpret_cast<float*>(fastlm_shared);
}

// Thread-block clusters. Launchers use them only where has_clusters() says so; elsewhere these are never reached.
FASTLM_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

FASTLM_DEVICE void cluster_sync() {  // a barrier of the cluster that also publishes shared memory
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// Reads the word of block `rank` of the cluster at the place where `mine` stands in this block's shared memory.
FASTLM_DEVICE float cluster_read(const float* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(mine))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
#else
  return *mine;
#endif
}
#endif

}  // namespace cuda
}  // namespace fastlm
