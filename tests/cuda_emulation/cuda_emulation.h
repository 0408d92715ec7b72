// A CUDA device on the CPU, small enough to trust: it lets csrc/cuda/*.cu compile as plain C++ and runs every thread of
// a cluster as a fiber, so that the logic of a kernel (indices, masks, barriers, reductions) can be tested where no GPU
// is. It says nothing about registers, alignment of PTX, memory order within a warp, or speed.
//
// - Barriers and shuffles wait for all their threads. If no fiber can go on, the launch throws: a divergent barrier.
// - Shared memory starts as NaN, with guard bytes behind it.
// - `reverse` runs the fibers in the opposite order: a missing barrier then changes results.
// - Vector types have their CUDA alignment, so -fsanitize=alignment finds an access that a GPU would refuse.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define FASTLM_DEVICE inline

using std::max;
using std::min;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim;

// --- the runtime's interface, as far as launchers use it ---
using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrComputeCapabilityMajor };
enum { cudaLaunchAttributeClusterDimension };
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulation {
struct Settings {
  int capability = 9, device = 0, launches = 0, clusters = 0;
  bool reverse = false, fail_next = false;
};
inline Settings settings;
}  // namespace emulation

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated failure"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::settings.device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return emulation::settings.device = device, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) { return bytes > 227 * 1024; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  return *value = emulation::settings.capability, cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->ptxVersion = 10 * emulation::settings.capability, cudaSuccess;
}

// --- the device ---
namespace emulation {

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  dim3 thread, block;
  int rank, warp;  // of the cluster's blocks; of all warps of the cluster
  bool started, done;
  int64_t block_waits, cluster_waits, shuffles;  // how often this fiber arrived
};

struct Device {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<std::vector<float>> shared;  // of each block
  struct Warp {
    float value[2][32];
    int64_t arrived[2];
  };
  std::vector<Warp> warps;
  std::vector<int64_t> block_arrived;
  int64_t cluster_arrived = 0;
  int threads = 0, cluster = 1;
  Fiber* now = nullptr;
  jmp_buf scheduler;
  ucontext_t main;
  void (*body)(const void*) = nullptr;
  const void* params = nullptr;
  bool progress = false;
};
inline Device device;

constexpr size_t kStack = 64 * 1024;
constexpr int kGuard = 16;  // floats

inline void run_body() {
  device.body(device.params);
  device.now->done = device.progress = true;
  _longjmp(device.scheduler, 1);
}

// Gives way to the other fibers until `ready`.
template <class Ready>
__attribute__((noinline)) void wait(Ready ready) {
  device.progress = true;
  while (!ready()) {
    if (_setjmp(device.now->jump) == 0) _longjmp(device.scheduler, 1);
  }
  device.progress = true;
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  device.now = &fiber;
  threadIdx = fiber.thread, blockIdx = fiber.block, blockDim = dim3(static_cast<unsigned>(device.threads));
  if (_setjmp(device.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

__attribute__((noinline)) inline void prepare(Fiber& fiber, char* stack) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &device.main;
  makecontext(&fiber.context, run_body, 0);
}

inline void run_cluster() {
  const int count = static_cast<int>(device.fibers.size());
  for (int alive = count; alive > 0;) {
    device.progress = false;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = device.fibers[settings.reverse ? count - 1 - i : i];
      if (fiber.done) continue;
      resume(fiber);
      alive -= fiber.done;
    }
    if (!device.progress) throw std::runtime_error("emulation: threads wait for a barrier that others never reach");
  }
}

template <class Params>
void call(const void* packed) {
  auto both = static_cast<const std::pair<void (*)(Params), const Params*>*>(packed);
  both->first(*both->second);
}
}  // namespace emulation

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  using namespace emulation;
  if (settings.fail_next) return settings.fail_next = false, cudaErrorInvalidValue;
  const int cluster = config->numAttrs ? static_cast<int>(config->attrs->val.clusterDim.x) : 1;
  const int threads = static_cast<int>(config->blockDim.x);
  if (threads % 32 || threads > 1024 || config->gridDim.x % cluster || config->gridDim.y > 65535) {
    return cudaErrorInvalidValue;
  }
  ++settings.launches;
  settings.clusters += cluster > 1;
  const std::pair<void (*)(Params), const Params*> packed(kernel, &params);
  Device& d = device;
  d.params = &packed;
  d.body = call<Params>;
  d.threads = threads;
  d.cluster = cluster;
  while (d.stacks.size() < static_cast<size_t>(threads) * cluster) d.stacks.emplace_back(new char[kStack]);
  const size_t words = config->dynamicSmemBytes / 4;
  for (unsigned y = 0; y < config->gridDim.y; ++y) {
    for (unsigned first = 0; first < config->gridDim.x; first += cluster) {
      d.shared.assign(cluster, std::vector<float>(words + kGuard, std::numeric_limits<float>::quiet_NaN()));
      for (auto& s : d.shared) std::fill(s.end() - kGuard, s.end(), 12345.0f);
      d.fibers.assign(static_cast<size_t>(threads) * cluster, Fiber{});
      d.warps.assign(d.fibers.size() / 32, {});
      d.block_arrived.assign(cluster, 0);
      d.cluster_arrived = 0;
      for (size_t i = 0; i < d.fibers.size(); ++i) {
        Fiber& f = d.fibers[i];
        f.rank = static_cast<int>(i) / threads;
        f.warp = static_cast<int>(i) / 32;
        f.thread = dim3(static_cast<unsigned>(i) % threads);
        f.block = dim3(first + f.rank, y);
        prepare(f, d.stacks[i].get());
      }
      run_cluster();
      for (auto& s : d.shared) {
        for (int i = 1; i <= kGuard; ++i) {
          if (s[s.size() - i] != 12345.0f) throw std::runtime_error("emulation: write beyond the shared memory");
        }
      }
    }
  }
  return cudaSuccess;
}

inline void __syncthreads() {
  using namespace emulation;
  Fiber& me = *device.now;
  const int64_t goal = ++me.block_waits * device.threads;
  ++device.block_arrived[me.rank];
  wait([&] { return device.block_arrived[me.rank] >= goal; });
}

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  using namespace emulation;
  static_assert(sizeof(Value) == 4, "shuffles of words");
  Fiber& me = *device.now;
  auto& warp = device.warps[me.warp];
  const int turn = me.shuffles & 1, lane = static_cast<int>(me.thread.x) % 32;
  const int64_t goal = (me.shuffles / 2 + 1) * 32;
  ++me.shuffles;
  std::memcpy(&warp.value[turn][lane], &value, 4);
  ++warp.arrived[turn];
  wait([&] { return warp.arrived[turn] >= goal; });
  std::memcpy(&value, &warp.value[turn][lane ^ mask], 4);
  return value;
}

namespace fastlm {
namespace cuda {
inline float* shared_memory() { return emulation::device.shared[emulation::device.now->rank].data(); }
inline int cluster_rank() { return emulation::device.now->rank; }
inline void cluster_sync() {
  using namespace emulation;
  const int64_t goal = ++device.now->cluster_waits * static_cast<int64_t>(device.fibers.size());
  ++device.cluster_arrived;
  wait([&] { return device.cluster_arrived >= goal; });
}
inline float cluster_read(const float* mine, int rank) {
  using namespace emulation;
  return device.shared[rank][mine - device.shared[device.now->rank].data()];
}
}  // namespace cuda
}  // namespace fastlm
