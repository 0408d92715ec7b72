// Masked AdamW on the CPU: the constants of a step, and pieces of rows to the threads. The loop is in
// prune_mask_adamw.cpp.
#include <cmath>

#include "cpu/prune_mask_adamw.h"
#include "cpu/prune_mask_entry.h"

namespace fastlm {
using masked_adamw_call::Constants;
using namespace prune_entry;
FASTLM_DECLARE(void, prune_adamw, (const Constants&, int, int64_t, void*, void*, void*, void*, const uint8_t*))
FASTLM_DECLARE(void, prune_apply, (char*, int, int64_t, int64_t, const uint8_t*))

namespace {
constexpr int64_t kStep = 8 * kPiece;  // elements of a piece, at most

void update(const Constants& c, int dtype, int64_t n, void* weight, void* grad, void* first, void* second,
            const uint8_t* mask) {
  FASTLM_DISPATCH(prune_adamw, c, dtype, n, weight, grad, first, second, mask);
}
void hold(char* x, int size, int64_t n, const uint8_t* mask) { FASTLM_DISPATCH(prune_apply, x, size, 1, n, mask); }

// In double, as PyTorch has them, and rounded once.
Constants constants(double step, const AdamW& a, const float* grad_scale) {
  const double bias1 = 1 - std::pow(a.beta1, step), bias2 = 1 - std::pow(a.beta2, step);
  Constants c;
  c.decay = static_cast<float>(1 - a.lr * a.weight_decay);
  const float first = static_cast<float>(1 - a.beta1);
  c.base = std::fabs(first) < 0.5f ? 0.0f : 1.0f;  // as torch.lerp, which goes from the nearer end
  c.first = first - c.base;
  c.beta2 = static_cast<float>(a.beta2);
  c.second = static_cast<float>(1 - a.beta2);
  c.root = static_cast<float>(std::sqrt(bias2));
  c.eps = static_cast<float>(a.eps);
  c.move = static_cast<float>(-(a.lr / bias1));
  c.scaled = grad_scale != nullptr;
  c.grad_scale = c.scaled ? *grad_scale : 1.0f;
  return c;
}

const float* one_float(const Tensor& t, const char* what) {
  if (t[0] != 0 && t[1] != kFloat32) throw std::invalid_argument(std::string("masked_adamw_: ") + what);
  return reinterpret_cast<const float*>(t[0]);
}
}  // namespace

void masked_adamw_cpu(int64_t rows, int64_t columns, Tensor weight, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq,
                      Tensor step, Tensor mask, AdamW options, Tensor grad_scale, Tensor found_inf, int threads) {
  const float* scale = one_float(grad_scale, "grad_scale must be float32");
  const float* found = one_float(found_inf, "found_inf must be float32");
  float* count = const_cast<float*>(one_float(step, "step must be float32"));
  if (count == nullptr) throw std::invalid_argument("masked_adamw_: step is missing");
  const bool skipped = found != nullptr && *found == 1.0f;
  *count += 1.0f;
  const double now = *count;
  if (found != nullptr) *count -= *found;
  if (rows * columns == 0) return;
  for (const Tensor* t : {&weight, &grad, &exp_avg, &exp_avg_sq}) {
    if ((*t)[0] == 0 || (*t)[1] != weight[1]) {
      throw std::invalid_argument("masked_adamw_: weight, grad and moments must be there and of one dtype");
    }
  }
  if (weight[1] != kFloat32 && weight[1] != kBFloat16 && weight[1] != kFloat16) {
    throw std::invalid_argument("masked_adamw_: weight must be float32, bfloat16 or float16");
  }
  if (mask[0] == 0 || mask[1] != kBool) throw std::invalid_argument("masked_adamw_: mask must be uint8");
  const Constants c = constants(now, options, scale);
  const int dtype = static_cast<int>(weight[1]), size = dtype == kFloat32 ? 4 : 2;
  const int64_t bytes = (columns + 7) / 8, cut = (columns + kStep - 1) / kStep, all = rows * cut;
  const int used = threads_for(rows * columns, threads);
  parallel(used, [&](int t) {
    for (int64_t p = part(all, t, used); p < part(all, t + 1, used); ++p) {
      const int64_t r = p / cut, at = p % cut * kStep, n = std::min(kStep, columns - at);
      const uint8_t* bits = reinterpret_cast<const uint8_t*>(mask[0]) + r * bytes + at / 8;
      char* of[4];
      const Tensor* tensors[4] = {&weight, &grad, &exp_avg, &exp_avg_sq};
      for (int i = 0; i < 4; ++i) of[i] = reinterpret_cast<char*>((*tensors[i])[0]) + (r * columns + at) * size;
      if (!skipped) {
        update(c, dtype, n, of[0], of[1], of[2], of[3], bits);
        continue;
      }
      for (int i : {0, 2, 3}) hold(of[i], size, n, bits);
    }
  });
}
}  // namespace fastlm
