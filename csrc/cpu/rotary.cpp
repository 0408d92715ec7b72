// rotary on the CPU, compiled once for each instruction set.
//
//   y_first = x_first * c - x_second * s,  y_second = x_second * c + x_first * s   with c, s of the row's position
//
// for pairs (i, i + half), or interleaved (2i, 2i + 1); what lies behind stays. Reads x once and writes y once: 8 bytes
// an element in float32, 4 in bfloat16, 3 flops an element; the table's row stays in the first-level cache while the
// heads of a position pass. Rows go to threads in one run each: nothing is summed, so nothing depends on their number.
#include "cpu/rotary.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

using rotary_call::Call;

template <class T>
FASTLM_INLINE Vec get(const char* p, int64_t i, int n) {
  p += i * static_cast<int64_t>(sizeof(typename T::Element));
  return n == kLanes ? T::load(p) : T::load_part(p, n);
}
template <class T>
FASTLM_INLINE void put(char* p, int64_t i, Vec v, int n) {
  p += i * static_cast<int64_t>(sizeof(typename T::Element));
  if (n == kLanes) {
    T::store(p, T::pack(v));
  } else {
    T::store_part(p, T::pack(v), n);
  }
}
FASTLM_INLINE Vec get_table(const float* p, int n) { return n == kLanes ? load(p) : F32::load_part(p, n); }

template <class T, bool kInterleaved>
FASTLM_INLINE void turn(const char* x, char* y, const float* cos, const float* sin, int64_t half, int64_t i, int n,
                        Vec sign) {
  const Vec c = get_table(cos + i, n), s = get_table(sin + i, n) * sign;
  if (kInterleaved) {
    // Pairs are dealt apart and together again through memory in the first-level cache.
    const int64_t at = 2 * i;
    const int low = 2 * n < kLanes ? 2 * n : kLanes, high = 2 * n - low;
    float in[2 * kLanes] = {}, first[kLanes], second[kLanes];
    store(in, get<T>(x, at, low));
    if (high > 0) store(in + kLanes, get<T>(x, at + kLanes, high));
    for (int k = 0; k < kLanes; ++k) first[k] = in[2 * k], second[k] = in[2 * k + 1];
    const Vec a = load(first), b = load(second);
    store(first, a * c - b * s);
    store(second, b * c + a * s);
    for (int k = 0; k < kLanes; ++k) in[2 * k] = first[k], in[2 * k + 1] = second[k];
    put<T>(y, at, load(in), low);
    if (high > 0) put<T>(y, at + kLanes, load(in + kLanes), high);
  } else {
    const Vec a = get<T>(x, i, n), b = get<T>(x, i + half, n);
    put<T>(y, i, a * c - b * s, n);
    put<T>(y, i + half, b * c + a * s, n);
  }
}

// The element at p + i, gathered into or scattered from adjacent ones.
template <class E>
void gather(const char* from, int64_t stride, char* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) reinterpret_cast<E*>(to)[i] = reinterpret_cast<const E*>(from)[i * stride];
}
template <class E>
void scatter(const char* from, char* to, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) reinterpret_cast<E*>(to)[i * stride] = reinterpret_cast<const E*>(from)[i];
}

template <class T, bool kInterleaved>
void rows(const Call& a, int64_t begin, int64_t end, char* lines) {
  typedef typename T::Element Element;
  const int64_t bytes = sizeof(Element), d = a.size[3];
  const bool heads_inside = a.x_stride[1] <= a.x_stride[2];
  const int64_t inner = heads_inside ? a.size[1] : a.size[2], outer = heads_inside ? a.size[2] : a.size[1];
  const bool gathered = a.x_stride[3] != 1 && d > 1, scattered = a.out_stride[3] != 1 && d > 1;
  char* const line_in = lines;
  char* const line_out = lines + d * static_cast<int64_t>(sizeof(float));
  const Vec sign = set1(a.inverse ? -1.0f : 1.0f);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i = r % inner, rest = r / inner, j = rest % outer, b = rest / outer;
    const int64_t h = heads_inside ? i : j, l = heads_inside ? j : i;
    int64_t position = l;
    if (a.positions) {
      const int64_t given = a.positions[b * a.position_stride[0] + (a.each ? l * a.position_stride[1] : 0)];
      position = a.each ? given : given + l;
    }
    position = position < 0 ? 0 : position >= a.table ? a.table - 1 : position;
    const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
    const char* x = a.x + (b * a.x_stride[0] + h * a.x_stride[1] + l * a.x_stride[2]) * bytes;
    char* y = a.out + (b * a.out_stride[0] + h * a.out_stride[1] + l * a.out_stride[2]) * bytes;
    char* const target = y;
    if (gathered) {
      gather<Element>(x, a.x_stride[3], line_in, d);
      x = line_in;
    }
    if (scattered) y = line_out;
    int64_t k = 0;
    for (; k + kLanes <= a.half; k += kLanes) turn<T, kInterleaved>(x, y, cos, sin, a.half, k, kLanes, sign);
    if (k < a.half) turn<T, kInterleaved>(x, y, cos, sin, a.half, k, static_cast<int>(a.half - k), sign);
    const int64_t turned = 2 * a.half;
    if (turned < d) memcpy(y + turned * bytes, x + turned * bytes, static_cast<size_t>((d - turned) * bytes));
    if (scattered) scatter<Element>(line_out, target, a.out_stride[3], d);
  }
}

template <class T>
void run(const Call& a, int64_t begin, int64_t end, char* lines) {
  if (a.interleaved) {
    rows<T, true>(a, begin, end, lines);
  } else {
    rows<T, false>(a, begin, end, lines);
  }
}

void part(const Call& a, int thread, int threads, char* workspace) {
  const int64_t count = a.size[0] * a.size[1] * a.size[2];
  const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
  char* const lines = workspace + thread * 2 * a.size[3] * static_cast<int64_t>(sizeof(float));
  if (a.dtype == 0) {
    run<F32>(a, begin, end, lines);
  } else if (a.dtype == 1) {
    run<BF16>(a, begin, end, lines);
  } else {
    run<F16>(a, begin, end, lines);
  }
}

}  // namespace

void rotary(const Call& a, char* workspace) {
#ifdef _OPENMP
  if (a.threads > 1) {
#pragma omp parallel num_threads(a.threads)
    part(a, omp_get_thread_num(), omp_get_num_threads(), workspace);
    return;
  }
#endif
  part(a, 0, 1, workspace);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
