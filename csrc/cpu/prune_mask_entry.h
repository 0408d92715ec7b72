// What the entries of prune_mask share: scores as rows and pieces of rows, and threads. Kernels see prune_mask.h alone.
#pragma once
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/prune_mask.h"
#include "fastlm.h"

namespace fastlm {
FASTLM_DECLARE(const float*, prune_fetch, (const prune_call::Row&, int64_t, int64_t, float*))

namespace prune_entry {
using prune_call::Row;
constexpr int64_t kPiece = prune_call::kPiece;
constexpr int64_t kParallelElements = 24 * 1024;  // below, a second thread costs more than it saves

inline const float* fetch(const Row& row, int64_t begin, int64_t n, float* buffer) {
  FASTLM_DISPATCH(prune_fetch, row, begin, n, buffer);
}

inline int64_t part(int64_t count, int thread, int threads) {
  return static_cast<int64_t>(static_cast<__int128>(count) * thread / threads);
}
template <class F>
void parallel(int threads, const F& body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) body(t);
}

struct View {
  Sizes size;  // three leading axes, columns
  Tensor x;
  const float* scale;
  bool magnitude;
  uint8_t* mask;
  int64_t rows, columns, bytes, pieces;  // bytes of a mask's row; pieces of a row

  Row row(int64_t r) const {
    const int64_t i2 = r % size[2], i1 = r / size[2] % size[1], i0 = r / size[2] / size[1];
    const int64_t at = i0 * x[2] + i1 * x[3] + i2 * x[4];
    const int64_t width = x[1] == kFloat32 ? 4 : 2;
    return {reinterpret_cast<const char*>(x[0]) + at * width, static_cast<int>(x[1]), x[5], magnitude, scale};
  }
};

inline View view(const PruneScores& s) {
  View v;
  v.size = s.sizes;
  for (int64_t n : s.sizes) {
    if (n < 0) throw std::invalid_argument("prune_mask: sizes must not be negative");
  }
  v.rows = s.sizes[0] * s.sizes[1] * s.sizes[2];
  v.columns = s.sizes[3];
  if (v.rows * v.columns == 0) v.rows = v.columns = 0;
  v.x = s.score;
  if (v.rows && (s.score[0] == 0 || s.mask[0] == 0))
    throw std::invalid_argument("prune_mask: score or mask is missing");
  if (s.score[1] != kFloat32 && s.score[1] != kBFloat16 && s.score[1] != kFloat16) {
    throw std::invalid_argument("prune_mask: score must be float32, bfloat16 or float16");
  }
  if (s.mask[1] != kBool) throw std::invalid_argument("prune_mask: mask must be uint8");
  if (s.scale[0] != 0 && s.scale[1] != kFloat32) throw std::invalid_argument("prune_mask: scale must be float32");
  v.scale = reinterpret_cast<const float*>(s.scale[0]);
  v.magnitude = s.magnitude || v.scale != nullptr;
  v.mask = reinterpret_cast<uint8_t*>(s.mask[0]);
  v.bytes = (v.columns + 7) / 8;
  v.pieces = (v.columns + kPiece - 1) / kPiece;
  return v;
}

inline int threads_for(int64_t elements, int threads) {
  return elements < kParallelElements || threads < 1 ? 1 : threads;
}

// Calls body(x, n, mask, row, column) for pieces [begin, end) of all views in order.
template <class F>
void pieces(const std::vector<View>& views, int64_t begin, int64_t end, const F& body) {
  float buffer[kPiece];
  int64_t first = 0;
  for (const View& v : views) {
    const int64_t all = v.rows * v.pieces;
    for (int64_t p = std::max(begin, first); p < std::min(end, first + all); ++p) {
      const int64_t r = (p - first) / v.pieces, at = (p - first) % v.pieces * kPiece;
      const int64_t n = std::min(kPiece, v.columns - at);
      body(fetch(v.row(r), at, n, buffer), n, v.mask + r * v.bytes + at / 8);
    }
    first += all;
  }
}

inline int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t magnitude = bits & 0x7FFFFFFF;
  return bits < 0 ? -magnitude : magnitude;
}

inline int64_t nan_of(const std::vector<View>& views) {
  int64_t nan = 0;
  for (const View& v : views) {
    for (int64_t r = 0; r < v.rows; ++r) {
      float buffer[kPiece];
      const Row row = v.row(r);
      for (int64_t at = 0; at < v.columns; at += kPiece) {
        const int64_t n = std::min(kPiece, v.columns - at);
        const float* x = fetch(row, at, n, buffer);
        for (int64_t i = 0; i < n; ++i) nan += x[i] != x[i];
      }
    }
  }
  return nan;
}

}  // namespace prune_entry
}  // namespace fastlm
