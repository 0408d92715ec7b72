// What both directions of dropout_add_norm share: rows of a tensor of any type and stride, the instance that serves a
// mixture of types, and threads.
#pragma once
#include "cpu/dropout_add_norm.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/keep.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

using dropout_add_norm::Backward;
using dropout_add_norm::Common;
using dropout_add_norm::Forward;
using dropout_add_norm::Operand;
using dropout_add_norm::padded;

constexpr int kBlock = 128;   // columns a Keep decides
constexpr int kAhead = 4096;  // bytes between what is read and what is asked for: hardware stops at the end of a page

// A row of a tensor. Any is one of the three types, chosen again at each vector: for mixtures without an instance.
struct Row {
  char* data;
  int dtype;
};
struct Any {};

template <class T>
FASTLM_INLINE char* at(Row r, int64_t column) {
  return r.data + column * static_cast<int64_t>(sizeof(typename T::Element));
}
template <>
inline __attribute__((always_inline)) char* at<Any>(Row r, int64_t column) {
  return r.data + (r.dtype == 0 ? column * 4 : column * 2);
}

// The n elements at column; n == kLanes is known at compile time where it matters. put rounds, stores unless the row is
// absent, and returns the rounded values. ahead asks for what stands a page further on: in a matrix, the next rows;
// ahead_l2 as far as the second-level cache, for where the first has no room left.
template <class T>
struct Access {
  FASTLM_INLINE Vec load(Row r, int64_t column, int n) {
    const char* p = at<T>(r, column);
    return n == kLanes ? T::load(p) : T::load_part(p, n);
  }
  FASTLM_INLINE Vec put(Row r, int64_t column, Vec x, int n, bool stream) {
    const typename T::Packed packed = T::pack(x);
    if (r.data) {
      char* p = at<T>(r, column);
      if (n != kLanes) {
        T::store_part(p, packed, n);
      } else if (stream) {
        T::stream(p, packed);
      } else {
        T::store(p, packed);
      }
    }
    return T::unpack(packed);
  }
  FASTLM_INLINE void ahead(Row r, int64_t column, int k) {
    if (sizeof(typename T::Element) == 4 || k % 2 == 0) prefetch(at<T>(r, column) + kAhead);
  }
  FASTLM_INLINE void ahead_l2(Row r, int64_t column) { __builtin_prefetch(at<T>(r, column) + kAhead, 0, 2); }
};
template <>
struct Access<Any> {
  FASTLM_INLINE Vec load(Row r, int64_t column, int n) {
    if (r.dtype == 0) return Access<F32>::load(r, column, n);
    return r.dtype == 1 ? Access<BF16>::load(r, column, n) : Access<F16>::load(r, column, n);
  }
  FASTLM_INLINE Vec put(Row r, int64_t column, Vec x, int n, bool stream) {
    if (r.dtype == 0) return Access<F32>::put(r, column, x, n, stream);
    return r.dtype == 1 ? Access<BF16>::put(r, column, x, n, stream) : Access<F16>::put(r, column, x, n, stream);
  }
  FASTLM_INLINE void ahead(Row, int64_t, int) {}
  FASTLM_INLINE void ahead_l2(Row, int64_t) {}
};

FASTLM_INLINE float element(const char* data, int dtype, int64_t index) {
  if (dtype == 0) return reinterpret_cast<const float*>(data)[index];
  float lanes[kLanes];
  const char* p = data + 2 * index;
  store(lanes, dtype == 1 ? BF16::load_part(p, 1) : F16::load_part(p, 1));
  return lanes[0];
}

// Parameters as float32, unit stride: the tensor itself where it is that already, else converted into `line`.
const float* parameter(const Operand& t, float offset, int64_t columns, float* line) {
  if (t.data == nullptr) return nullptr;
  if (t.dtype == 0 && offset == 0.0f && (t.stride[3] == 1 || columns == 1)) return reinterpret_cast<float*>(t.data);
  for (int64_t c = 0; c < columns; ++c) line[c] = element(t.data, t.dtype, c * t.stride[3]) + offset;
  return line;
}

// Walks a tensor row by row; a row whose columns are not adjacent is gathered into `line`.
struct Walk {
  Operand t;
  int64_t size1, size2, columns;
  bool matrix;
  float* line;

  Walk(const Operand& operand, const Common& a, float* buffer)
      : t(operand),
        size1(a.size[1]),
        size2(a.size[2]),
        columns(a.size[3]),
        matrix(a.size[0] == 1 && a.size[1] == 1),
        line(buffer) {}
  int64_t offset(int64_t row) const {
    if (matrix) return row * t.stride[2];
    const int64_t j = row / size2, i = j / size1;
    return i * t.stride[0] + (j - i * size1) * t.stride[1] + (row - j * size2) * t.stride[2];
  }
  Row row(int64_t r) const {
    if (t.data == nullptr) return {nullptr, t.dtype};
    char* p = t.data + offset(r) * (t.dtype == 0 ? 4 : 2);
    if (t.stride[3] == 1 || columns == 1) return {p, t.dtype};
    if (t.dtype == 0) {
      for (int64_t c = 0; c < columns; ++c) line[c] = reinterpret_cast<float*>(p)[c * t.stride[3]];
    } else {
      uint16_t* half = reinterpret_cast<uint16_t*>(line);
      for (int64_t c = 0; c < columns; ++c) half[c] = reinterpret_cast<uint16_t*>(p)[c * t.stride[3]];
    }
    return {reinterpret_cast<char*>(line), t.dtype};
  }
  float value(int64_t r) const { return element(t.data, t.dtype, offset(r)); }
};

// Whether stores past the cache may be used: every row of an output must start on a cache line.
bool streams(const Common& a, const Operand& t) {
  const int64_t bytes = a.size[3] * (t.dtype == 0 ? 4 : 2);
  return a.stream && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(t.data) % 64 == 0;
}

FASTLM_INLINE void stream_fence() {
#if FASTLM_ISA_avx512 || FASTLM_ISA_avx2
  _mm_sfence();  // stores past the cache are seen before whatever tells others that the work is done
#endif
}

FASTLM_INLINE uint64_t row_number(const Common& a, int64_t row) {
  return static_cast<uint64_t>(a.row_numbers ? a.row_numbers[row * a.row_numbers_stride] : a.first_row + row);
}

FASTLM_INLINE Vec load_some(const float* p, int n) { return n == kLanes ? load(p) : F32::load_part(p, n); }

// Calls work(thread, threads) on each thread.
template <class Work>
void on_threads(int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  work(0, 1);
}

// Which instance: 0, 1, 2 where branch and stream tensors all are of that type; 3, 4 for a bfloat16 or float16 branch
// on a float32 stream; 5 for the rest.
struct Types {
  int branch = -1, stream = -1;
  bool mixed = false;
  void note(int& type, const Operand& t, bool counts) {
    if (!counts) return;
    if (type >= 0 && type != t.dtype) mixed = true;
    type = t.dtype;
  }
  void of_branch(const Operand& t) { note(branch, t, t.data != nullptr); }
  void of_stream(const Operand& t) { note(stream, t, t.data != nullptr); }
  int instance() const {
    const int b = branch >= 0 ? branch : stream, s = stream >= 0 ? stream : b;
    if (mixed) return 5;
    if (b == s) return b;
    return s == 0 ? 2 + b : 5;
  }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
