// quantize_int8 on the CPU: checks the arguments and picks the instruction set.
#include <stdexcept>

#include "common/philox.h"
#include "cpu/dispatch.h"
#include "cpu/quantize_int8.h"
#include "fastlm.h"

namespace fastlm {
FASTLM_DECLARE(void, quantize_int8, (const quantize_int8_call::Call&))

namespace {
constexpr int64_t kParallelElements = 32 * 1024;  // below, a second thread costs more than it saves

void run(const quantize_int8_call::Call& a) { FASTLM_DISPATCH(quantize_int8, a); }
void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("quantize_int8: ") + what);
}
}  // namespace

void quantize_int8_cpu(Sizes sizes, Tensor x, int64_t group, Tensor seed, Tensor given, Tensor q, Tensor scale,
                       Tensor most, int threads) {
  quantize_int8_call::Call a;
  int64_t count = 1;
  for (int i = 0; i < 4; ++i) {
    check(sizes[i] >= 0, "sizes must not be negative");
    a.size[i] = sizes[i];
    a.x_stride[i] = x[2 + i], a.q_stride[i] = q[2 + i], a.scale_stride[i] = scale[2 + i];
    count *= sizes[i];
  }
  if (count == 0) return;
  check(x[0] != 0 && (x[1] == kFloat32 || x[1] == kBFloat16 || x[1] == kFloat16),
        "x must be float32, bfloat16 or float16");
  check(most[0] != 0 || (q[0] != 0 && q[1] == kInt8), "q must be int8");
  check(most[0] != 0 || given[0] != 0 || (scale[0] != 0 && scale[1] == kFloat32), "scale must be float32");
  check((given[0] == 0 || given[1] == kFloat32) && (most[0] == 0 || most[1] == kFloat32),
        "given and most must be float32");
  check(seed[0] == 0 || seed[1] == kInt64, "seed must be int64");
  check(group == 0 || group == 32 || group == 64 || group == 128, "group must be 0, 32, 64 or 128");
  check(group == 0 || (given[0] == 0 && most[0] == 0), "a given scale serves no groups");
  a.x = reinterpret_cast<const char*>(x[0]);
  a.x_dtype = x[1];
  a.q = reinterpret_cast<int8_t*>(q[0]);
  a.scale = reinterpret_cast<float*>(scale[0]);
  a.group = group ? group : sizes[3];
  a.random = seed[0] != 0;
  a.key = a.random ? static_cast<uint64_t>(*reinterpret_cast<const int64_t*>(seed[0])) ^ philox::kKeyQuantizeInt8 : 0;
  a.given = reinterpret_cast<const float*>(given[0]);
  a.most = reinterpret_cast<float*>(most[0]);
  a.threads = count < kParallelElements || threads < 1 ? 1 : threads;
  run(a);
}
}  // namespace fastlm
