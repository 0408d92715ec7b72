// What entry_prune_mask_adamw.cpp hands to the kernel: free of STL (see simd.h).
#pragma once
#include <stdint.h>

namespace fastlm {
namespace masked_adamw_call {

// The constants of one step of one tensor.
struct Constants {
  float decay;        // 1 - lr * weight_decay
  float first, base;  // m + first (g - m), or with base 1: g + first (g - m)
  float beta2, second;
  float root, eps;   // sqrt(v) / root + eps
  float move;        // -lr / (1 - beta1^step)
  float grad_scale;  // gradients are divided by it where `scaled`
  bool scaled;
};

}  // namespace masked_adamw_call
}  // namespace fastlm
