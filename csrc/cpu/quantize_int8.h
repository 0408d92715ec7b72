// What entry_quantize_int8.cpp hands to the kernel: checked, and free of STL (see simd.h).
#pragma once
#include <stdint.h>

namespace fastlm {
namespace quantize_int8_call {

struct Call {
  int64_t size[4];  // lines over three axes, elements of a line
  const char* x;
  int64_t x_dtype, x_stride[4];
  int8_t* q;
  int64_t q_stride[4];
  float* scale;
  int64_t scale_stride[4];
  int64_t group;  // elements that share a scale: the whole line, or 32, 64 or 128
  bool random;    // stochastic rounding with `key`
  uint64_t key;
  const float* given;  // the scale of all, or null
  float* most;         // where to put max |x| of each line, and nothing else; or null
  int threads;
};

}  // namespace quantize_int8_call
}  // namespace fastlm
