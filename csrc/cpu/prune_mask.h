// What entry_prune_mask.cpp hands to the kernels, a piece of one row at a time: free of STL (see simd.h).
#pragma once
#include <stdint.h>

namespace fastlm {
namespace prune_call {

constexpr int kBins = 2048;           // of a histogram
constexpr int kPiece = 2048;          // columns of a piece, at most; pieces begin at a multiple of 16
constexpr int kFew = 1024;            // so many scores of one bin are told apart one by one
constexpr int32_t kInf = 0x7F800000;  // the key of infinity

// Scores [n] of one row.
struct Row {
  const char* x;
  int dtype;           // DType of fastlm.h: 0 float32, 1 bfloat16, 2 float16
  int64_t stride;      // in elements
  bool magnitude;      // |x|
  const float* scale;  // or |x| * scale; null: none
};

// A score's key is its magnitude's bits with its sign: the order of the scores, -0 = +0. NaN lies outside +-kInf.
struct Histogram {
  int64_t below, nan;      // keys below the range; NaN
  int64_t bins[2][kBins];  // even and odd columns, so that one counter is not waited for twice in a row
};

struct Candidate {
  int32_t key;
  uint8_t bit;
  uint8_t* byte;
};

// How the second pass decides within [low, last]: as ties, of which the first `ties` go, or as candidates.
struct Writer {
  int32_t low, last;
  bool equal;  // low == last
  int64_t ties;
  Candidate* candidates;
  int64_t found;
};

}  // namespace prune_call
}  // namespace fastlm
