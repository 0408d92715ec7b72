// What entry_rotary.cpp hands to the kernel: checked, and free of STL (see simd.h).
#pragma once
#include <stdint.h>

namespace fastlm {
namespace rotary_call {

struct Call {
  int64_t size[4];  // batch, heads, positions, head size
  const char* x;
  char* out;
  int dtype;  // DType of fastlm.h: 0 float32, 1 bfloat16, 2 float16
  int64_t x_stride[4], out_stride[4];
  const float *cos, *sin;  // [table][half]
  int64_t table, half;
  const int64_t* positions;    // null: 0, 1, ...
  int64_t position_stride[2];  // of batch and row
  bool each;                   // positions of every row, not of the first
  bool interleaved, inverse;
  int threads;
};

}  // namespace rotary_call
}  // namespace fastlm
