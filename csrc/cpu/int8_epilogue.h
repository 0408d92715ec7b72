// From sums to the result: scales, bias, activation, rounding, for up to kMostPanel columns of a row.
//
//   y = activation((float(acc) * a_scale) * b_scale + bias)     every step rounded on its own: no fused multiply-add
//
// erf: t P(t^2) below 1 and 1 - exp(-t Q(t)) above, polynomials through Chebyshev nodes, within 3 * 2^-24.
#pragma once
#include "cpu/attention_simd.h"
#include "cpu/int8_matmul.h"
#include "cpu/int8_simd.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int kMostPanel = 64;

FASTLM_INLINE Vec erf_of(Vec x) {
  const Vec t = minimum(absolute(x), set1(4.0f)), s = t * t;
  Vec p = set1(0x1.4a5690p-14f);
  p = fma(p, s, set1(-0x1.a45088p-11f));
  p = fma(p, s, set1(0x1.541270p-8f));
  p = fma(p, s, set1(-0x1.b7faba0p-6f));
  p = fma(p, s, set1(0x1.ce2d10p-4f));
  p = fma(p, s, set1(-0x1.81273ep-2f));
  p = fma(p, s, set1(0x1.20dd74p+0f));
  Vec q = set1(-0x1.319ac2p-20f);
  q = fma(q, t, set1(0x1.2eb0d4p-15f));
  q = fma(q, t, set1(-0x1.0c55eep-11f));
  q = fma(q, t, set1(0x1.1d927ep-8f));
  q = fma(q, t, set1(-0x1.9e005cp-6f));
  q = fma(q, t, set1(0x1.ba8370p-4f));
  q = fma(q, t, set1(0x1.449d80p-1f));
  q = fma(q, t, set1(0x1.210278p+0f));
  const Vec large = set1(1.0f) - exp_of(t * q, Factor::of(-kLog2e));
  const Vec size = select(less(t, set1(1.0f)), p * t, large);
  return select(less(x, zero()), zero() - size, size);
}

FASTLM_INLINE Vec activated(Vec y, int activation) {
  const Vec half = y * set1(0.5f), one = set1(1.0f);
  switch (activation) {  // a NaN stays one: every case has y itself as a factor
    case int8_matmul_call::kGelu:
      return half * (one + erf_of(y * set1(0.70710678118654752440f)));
    case int8_matmul_call::kGeluTanh:
      return half * (one + tanh(fma(y * y * set1(0.044715f), y, y) * set1(0.79788456080286535588f)));
    default:
      // from -89 on the exponential is +inf on every instruction set: a finite y gives -0, and -inf NaN, as in PyTorch
      return divide(y, one + exp_of(maximum(y, set1(-89.0f)), Factor::of(-kLog2e)));
  }
}

// What the columns of a panel share, as floats; columns beyond the last are 0.
struct Columns {
  float scale[kMostPanel], bias[kMostPanel];
  bool scaled, biased;

  FASTLM_NOINLINE void fill(Columns& c, const int8_matmul_call::Call& call, int64_t column, int count) {
    c.scaled = call.b_scale != nullptr && call.group == 0;
    c.biased = call.bias != nullptr;
    for (int i = 0; i < kMostPanel; i += kLanes) {
      const int n = count - i < 0 ? 0 : count - i < kLanes ? count - i : kLanes;
      for (int j = 0; j < n && c.scaled; ++j) c.scale[i + j] = call.b_scale[(column + i + j) * call.b_scale_stride];
      for (int j = c.scaled ? n : 0; j < kLanes; ++j) c.scale[i + j] = 0.0f;
      Vec bias = zero();
      if (c.biased && n > 0) {
        const int64_t at = (column + i) * call.bias_stride * size_of(call.bias_dtype);
        bias = load_strided(call.bias + at, call.bias_dtype, call.bias_stride, n);
      }
      store(c.bias + i, bias);
    }
  }
};

FASTLM_INLINE void finish(const int8_matmul_call::Call& call, const Columns& c, Vec y, int i, char* out, int n) {
  if (c.scaled) y = y * load(c.scale + i);
  if (c.biased) y = y + load(c.bias + i);
  if (call.activation != int8_matmul_call::kNone) y = activated(y, call.activation);
  store_strided(out, call.out_dtype, 1, y, n);
}

// sums [count] of a row to out + column, of the call's out_dtype.
FASTLM_INLINE void write_sums(const int8_matmul_call::Call& call, const Columns& c, const int32_t* sums, int64_t row,
                              int64_t column, int count) {
  if (call.out_dtype == kInt32) {
    memcpy(call.out + (row * call.n + column) * 4, sums, static_cast<size_t>(count) * 4);
    return;
  }
  const float a_scale = call.a_scale ? call.a_scale[row * call.a_scale_stride] : 1.0f;
  const int size = size_of(call.out_dtype);
  char* out = call.out + (row * call.n + column) * size;
  for (int i = 0; i < count; i += kLanes) {
    Vec y = int32_to_float(sums + i);
    if (call.a_scale) y = y * set1(a_scale);
    finish(call, c, y, i, out + i * size, count - i);
  }
}
// The same of float sums (weight-only).
FASTLM_INLINE void write_floats(const int8_matmul_call::Call& call, const Columns& c, const float* sums, int64_t row,
                                int64_t column, int count) {
  const int size = size_of(call.out_dtype);
  char* out = call.out + (row * call.n + column) * size;
  for (int i = 0; i < count; i += kLanes) finish(call, c, load(sums + i), i, out + i * size, count - i);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
