// What entry_dropout_add_norm.cpp hands to the kernels: checked, and free of STL (see simd.h).
#pragma once
#include <stdint.h>

namespace fastlm {
namespace dropout_add_norm {

constexpr int kLayer = 0, kRms = 1, kNone = 2;  // Norm of fastlm.h

// A tensor: rows over three leading axes, columns last; strides in elements, address null = absent.
struct Operand {
  char* data;
  int dtype;          // DType of fastlm.h: 0 float32, 1 bfloat16, 2 float16
  int64_t stride[4];  // of axes 0, 1, 2 and the columns
};

struct Common {
  int64_t size[4];  // three leading axes, columns
  int64_t rows;
  int norm;
  bool drop;
  uint64_t key;                // of Philox
  uint32_t threshold;          // 16-bit values below it are dropped
  float keep_scale;            // of the survivors; 1 without dropout
  int64_t first_row;           // global number of row 0, where row_numbers is null
  const int64_t* row_numbers;  // global number of each row, or null
  int64_t row_numbers_stride;
  bool stream;  // outputs too large for the cache are written past it
  int threads;
  float weight_offset;
};

struct Forward : Common {
  Operand x, residual, weight, bias, layerscale, rowscale, y, z;  // z null: not stored, but rounded to z.dtype
  float eps;
  float *mean, *rstd;
  int8_t* q;       // null, or where y goes as int8 too: [rows][columns],
  float* q_scale;  // and its scales: [rows]
};

struct Backward : Common {
  Operand dy, dz, z, x, weight, layerscale, rowscale, dx, dresidual, dweight, dbias, dlayerscale;
  const float *mean, *rstd;
};

// --- workspace, in floats; lines of `padded` floats stay 64-byte aligned ---
constexpr int kForwardLines = 3;   // of each thread: the row in float32, two gathered inputs
constexpr int kBackwardLines = 7;  // of each thread: sums of three parameter gradients, four gathered inputs
constexpr int kVectors = 3;        // shared: parameters converted to float32

static inline __attribute__((always_inline)) int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64; }

// Parameter gradients are summed over blocks of rows, of a size that depends on the shape alone, so that they are the
// same at any thread count; within a block over kSubRows rows at a time.
constexpr int64_t kSubRows = 32, kBlocks = 128;
static inline __attribute__((always_inline)) int64_t block_rows(int64_t rows) {
  const int64_t even = (rows + kBlocks - 1) / kBlocks;
  return even == 0 ? kSubRows : (even + kSubRows - 1) / kSubRows * kSubRows;
}
static inline __attribute__((always_inline)) int64_t blocks(int64_t rows) {
  return (rows + block_rows(rows) - 1) / block_rows(rows);
}

}  // namespace dropout_add_norm

#define FASTLM_DAN(isa)                                                                  \
  namespace isa {                                                                        \
  void dropout_add_norm_forward(const dropout_add_norm::Forward& a, float* workspace);   \
  void dropout_add_norm_backward(const dropout_add_norm::Backward& a, float* workspace); \
  }
FASTLM_DAN(portable)
FASTLM_DAN(avx2)
FASTLM_DAN(avx512)
#undef FASTLM_DAN
}  // namespace fastlm
