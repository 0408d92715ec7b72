// What entry_int8_matmul.cpp hands to the kernels: checked, and free of STL (see simd.h).
#pragma once
#include <stdint.h>

namespace fastlm {
namespace int8_matmul_call {

constexpr int64_t kFloatBlock = 1024;    // of K: what a sum of floats adds before it is folded (int8_weight_only.cpp)
constexpr int64_t kMostFloatPanel = 32;  // columns of a panel of floats, of any instruction set

enum Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3 };

struct Call {
  int64_t m, n, k;
  const char* a;  // int8, or of a_dtype (weight-only)
  int64_t a_dtype, a_stride[2];
  const int8_t* b;
  int64_t b_stride[2];   // along K, along N
  const float* a_scale;  // null: 1
  int64_t a_scale_stride;
  const float* b_scale;                           // null: 1
  int64_t b_scale_stride, b_group_stride, group;  // group 0: one scale a column
  const char* bias;                               // null: none
  int64_t bias_dtype, bias_stride;
  int activation;
  char* out;  // [m][n]
  int64_t out_dtype;
  int threads;
};

// How a call is cut: tasks of `rows` rows and `columns` columns, which threads take one after another. A function of
// the shape and of the layouts alone.
struct Tiles {
  int64_t rows, columns;    // of a task
  int64_t block;            // of K, of operands widened to int16 (int8_pairs.h); 0: bytes as they lie
  int64_t panel;            // columns whose weights stay in the cache while the rows of a task pass by
  bool gather_a, gather_b;  // rows of a, columns of b are no runs of bytes: each task gathers what it reads
  int64_t scratch;          // bytes a thread
};

}  // namespace int8_matmul_call
}  // namespace fastlm
