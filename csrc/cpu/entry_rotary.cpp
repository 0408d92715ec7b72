// rotary on the CPU: checks the arguments and picks the instruction set.
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/rotary.h"
#include "fastlm.h"

namespace fastlm {
FASTLM_DECLARE(void, rotary, (const rotary_call::Call&, char*))

namespace {
constexpr int64_t kParallelElements = 24 * 1024;  // below, a second thread costs more than it saves

void run(const rotary_call::Call& a, char* workspace) { FASTLM_DISPATCH(rotary, a, workspace); }
}  // namespace

void rotary_cpu(Sizes sizes, Tensor x, Tensor cos, Tensor sin, Tensor positions, bool each, int64_t table, int64_t half,
                bool interleaved, bool inverse, Tensor out, int threads) {
  rotary_call::Call a;
  int64_t count = 1;
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] < 0) throw std::invalid_argument("rotary: sizes must not be negative");
    a.size[i] = sizes[i];
    a.x_stride[i] = x[2 + i];
    a.out_stride[i] = out[2 + i];
    count *= sizes[i];
  }
  if (count == 0) return;
  if (x[0] == 0 || out[0] == 0) throw std::invalid_argument("rotary: x or out is missing");
  if (x[1] != out[1] || (x[1] != kFloat32 && x[1] != kBFloat16 && x[1] != kFloat16)) {
    throw std::invalid_argument("rotary: x and out must both be float32, bfloat16 or float16");
  }
  if (cos[0] == 0 || sin[0] == 0 || cos[1] != kFloat32 || sin[1] != kFloat32) {
    throw std::invalid_argument("rotary: cos and sin must be float32");
  }
  if (half < 1 || 2 * half > sizes[3] || table < 1 || (positions[0] == 0 && table < sizes[2])) {
    throw std::invalid_argument("rotary: cos and sin must fit x");
  }
  if (positions[0] != 0 && positions[1] != kInt64) throw std::invalid_argument("rotary: positions must be int64");
  a.x = reinterpret_cast<const char*>(x[0]);
  a.out = reinterpret_cast<char*>(out[0]);
  a.dtype = static_cast<int>(x[1]);
  a.cos = reinterpret_cast<const float*>(cos[0]);
  a.sin = reinterpret_cast<const float*>(sin[0]);
  a.table = table;
  a.half = half;
  a.positions = reinterpret_cast<const int64_t*>(positions[0]);
  a.position_stride[0] = positions[2];
  a.position_stride[1] = positions[3];
  a.each = each;
  a.interleaved = interleaved;
  a.inverse = inverse;
  a.threads = count < kParallelElements || threads < 1 ? 1 : threads;
  std::vector<float> lines(static_cast<size_t>(a.threads) * 2 * static_cast<size_t>(sizes[3]));
  run(a, reinterpret_cast<char*>(lines.data()));
}
}  // namespace fastlm
