// int8_matmul on the CPU: checks the arguments, cuts the call into tasks and picks the instruction set.
#include <algorithm>
#include <memory>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/int8_matmul.h"
#include "fastlm.h"

namespace fastlm {
using int8_matmul_call::Call;
using int8_matmul_call::Tiles;
FASTLM_DECLARE(void, int8_product, (const Call&, const Tiles&, char*))
FASTLM_DECLARE(void, int8_weight_only, (const Call&, const Tiles&, char*))

namespace {
constexpr int64_t kParallelProducts = 1 << 20;  // below, a second thread costs more than it saves
constexpr int64_t kFirstCache = 24 * 1024;      // bytes of a panel of weights
constexpr int64_t kPairsFrom = 96;              // rows from which operands of int16 pay on AVX2
constexpr int64_t kPairRows = 252;              // most rows of a task of them
constexpr int64_t kPairBlock = 512;             // of K
constexpr int64_t kFloatRows = 192;             // most rows of a weight-only task

void run(const Call& call, const Tiles& tiles, char* scratch) {
  if (call.a_dtype == kInt8) {
    FASTLM_DISPATCH(int8_product, call, tiles, scratch);
  } else {
    FASTLM_DISPATCH(int8_weight_only, call, tiles, scratch);
  }
}

bool is_float(int64_t dtype) { return dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16; }

void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("int8_matmul: ") + what);
}

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Weight-only: as many rows as make what the floats of a panel cost small beside the products with it.
Tiles cut_floats(const Call& call) {
  Tiles t;
  t.block = 0;
  t.gather_a = call.a_stride[1] != 1 && call.k > 1;
  t.gather_b = call.b_stride[0] != 1 && call.k > 1;
  t.panel = int8_matmul_call::kMostFloatPanel;
  const int64_t cuts = (call.m + kFloatRows - 1) / kFloatRows;
  t.rows = std::min(call.m, ((call.m + cuts - 1) / cuts + 5) / 6 * 6);
  const int64_t down = (call.m + t.rows - 1) / t.rows, wanted = std::max<int64_t>(1, 4 * call.threads / down);
  const int64_t share = std::clamp<int64_t>((call.n + wanted - 1) / wanted, 256, 1024);
  t.columns = std::min((share + t.panel - 1) / t.panel, (call.n + t.panel - 1) / t.panel) * t.panel;
  const int64_t depth = (call.k + 15) / 16 * 16, block = std::min(depth, int8_matmul_call::kFloatBlock);
  // One or two rows, which the last task may have, are whole; else a panel, eight lines, and all rows with some space.
  const int64_t whole = std::min<int64_t>(t.rows, 2) * depth;
  const int64_t many = (block + 16) * (t.panel + 8) + (t.rows + 6) * (block + 64);
  t.scratch = aligned(4 * (t.rows * t.columns + std::max(whole, many)) + 64);
  return t;
}

// AVX2 has no product of bytes: many rows pay for int16. A panel of a block and six rows stay in the first cache.
Tiles cut_pairs(const Call& call) {
  Tiles t;
  t.gather_a = t.gather_b = false;  // widened from wherever they lie
  t.panel = 16;
  const int64_t blocks = (call.k + kPairBlock - 1) / kPairBlock;
  t.block = ((call.k + blocks - 1) / blocks + 15) / 16 * 16;
  const int64_t cuts = (call.m + kPairRows - 1) / kPairRows;
  t.rows = std::min(call.m, ((call.m + cuts - 1) / cuts + 5) / 6 * 6);
  const int64_t down = (call.m + t.rows - 1) / t.rows, wanted = std::max<int64_t>(1, 4 * call.threads / down);
  const int64_t share = std::clamp<int64_t>((call.n + wanted - 1) / wanted, 128, 512);
  t.columns = std::min((share + 15) / 16, (call.n + 15) / 16) * 16;
  t.scratch = aligned(4 * t.rows * t.columns + 2 * t.block * 16 + 2 * t.rows * (t.block + 16) + 64);
  return t;
}

// Tasks of as many rows as pay for a panel, and of as many columns as leave each thread a few tasks.
Tiles cut(const Call& call) {
  if (call.a_dtype != kInt8) return cut_floats(call);
  if (isa() == Isa::avx2 && call.m >= kPairsFrom && call.k > 0) return cut_pairs(call);
  Tiles t;
  t.block = 0;
  t.gather_a = call.a_stride[1] != 1 && call.k > 1;
  t.gather_b = call.b_stride[0] != 1 && call.k > 1;
  t.panel = std::clamp<int64_t>(kFirstCache / std::max<int64_t>(call.k, 1) / 16 * 16, 16, 64);
  t.rows = std::min<int64_t>(call.m, t.gather_b || t.gather_a ? 256 : 128);
  const int64_t down = (call.m + t.rows - 1) / t.rows, wanted = std::max<int64_t>(1, 8 * call.threads / down);
  const int64_t share = std::max<int64_t>((call.n + wanted - 1) / wanted, t.gather_a ? 256 : 1);
  t.columns = (share + t.panel - 1) / t.panel * t.panel;
  t.scratch = aligned(8 * t.rows + (t.gather_a ? t.rows * call.k : 0) + (t.gather_b ? t.panel * call.k : 0) + 64);
  return t;
}
}  // namespace

void int8_matmul_cpu(std::array<int64_t, 3> sizes, Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, int64_t group,
                     Tensor bias, int activation, Tensor out, int threads) {
  Call call;
  call.m = sizes[0], call.n = sizes[1], call.k = sizes[2];
  check(call.m >= 0 && call.n >= 0 && call.k >= 0, "sizes must not be negative");
  if (call.m == 0 || call.n == 0) return;
  check(out[0] != 0, "out is missing");
  check(call.k == 0 || (a[0] != 0 && b[0] != 0), "a or b is missing");
  check(a[1] == kInt8 || is_float(a[1]), "a must be int8, float32, bfloat16 or float16");
  check(b[1] == kInt8, "b must be int8");
  check(is_float(out[1]) || (out[1] == kInt32 && a[1] == kInt8 && a_scale[0] == 0 && b_scale[0] == 0 && bias[0] == 0 &&
                             activation == 0),
        "out must be float32, bfloat16 or float16, or int32 of the bare product");
  check(a[1] != kInt8 || call.k <= 131071, "K must be at most 131,071");
  check((a_scale[0] == 0 || a_scale[1] == kFloat32) && (b_scale[0] == 0 || b_scale[1] == kFloat32),
        "scales must be float32");
  check(group == 0 || (b_scale[0] != 0 && a[1] != kInt8 && (group == 32 || group == 64 || group == 128)),
        "group must be 0, or 32, 64 or 128 with b_scale and a floating a");
  check(bias[0] == 0 || is_float(bias[1]), "bias must be float32, bfloat16 or float16");
  check(activation >= 0 && activation <= 3, "activation must be 0 to 3");
  call.a = reinterpret_cast<const char*>(a[0]);
  call.a_dtype = a[1], call.a_stride[0] = a[2], call.a_stride[1] = a[3];
  call.b = reinterpret_cast<const int8_t*>(b[0]);
  call.b_stride[0] = b[2], call.b_stride[1] = b[3];
  call.a_scale = reinterpret_cast<const float*>(a_scale[0]);
  call.a_scale_stride = a_scale[2];
  call.b_scale = reinterpret_cast<const float*>(b_scale[0]);
  call.b_group_stride = b_scale[2], call.b_scale_stride = b_scale[3], call.group = group;
  call.bias = reinterpret_cast<const char*>(bias[0]);
  call.bias_dtype = bias[1], call.bias_stride = bias[5];
  call.activation = activation;
  call.out = reinterpret_cast<char*>(out[0]);
  call.out_dtype = out[1];
  const bool small = call.m * call.n * call.k < kParallelProducts;
  call.threads = small || threads < 1 ? 1 : threads;
  const Tiles tiles = cut(call);
  const std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(tiles.scratch * call.threads + 64)]);
  const uintptr_t at = (reinterpret_cast<uintptr_t>(scratch.get()) + 63) / 64 * 64;
  run(call, tiles, reinterpret_cast<char*>(at));
}
}  // namespace fastlm
