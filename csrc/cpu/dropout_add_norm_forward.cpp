// dropout_add_norm on the CPU, forward, compiled once for each instruction set.
//
//   z = residual + rowscale * layerscale * dropout(x)     rounded to z's type
//   y = (z - mean) * rstd * (weight + offset) + bias       of the rounded z, rounded once
//
// Reads x and residual once, writes z and y once: 16 bytes an element in float32, 8 in bfloat16; about 10 flops an
// element, and 0.8 vector instructions of random numbers. The row stays in the first-level cache as float32 between the
// three passes (z and its sum; the squares about the mean; y). With q, each row of y as it was rounded is then turned
// to int8 with one scale, as quantize_int8 does it: a byte an element more is written and nothing is read.
//
// Every sum runs in an order that depends on the shape alone, and nothing contracts a*b+c: the same bits on every
// instruction set and at any thread count.
#include "cpu/dropout_add_norm_rows.h"
#include "cpu/int8_round.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The sum of (x - mean)^2, in four sums of sixteen lanes.
float sum_of_squares(const float* x, float mean, int64_t columns) {
  const Vec m = set1(mean);
  Vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  int64_t c = 0;
  for (; c + 4 * kLanes <= columns; c += 4 * kLanes) {
    const Vec d0 = load(x + c) - m, d1 = load(x + c + kLanes) - m;
    const Vec d2 = load(x + c + 2 * kLanes) - m, d3 = load(x + c + 3 * kLanes) - m;
    s0 = s0 + d0 * d0, s1 = s1 + d1 * d1, s2 = s2 + d2 * d2, s3 = s3 + d3 * d3;
  }
  for (; c + kLanes <= columns; c += kLanes) {
    const Vec d = load(x + c) - m;
    s0 = s0 + d * d;
  }
  if (c < columns) {
    const Vec d = first(load(x + c) - m, static_cast<int>(columns - c));
    s1 = s1 + d * d;
  }
  return sum((s0 + s1) + (s2 + s3));
}

// A row of float32 to int8 and its scale; `most` holds its largest magnitude, lane by lane.
void int8_row(const float* row, Vec most, int64_t columns, int8_t* q, float* scale_out) {
  const float scale = scale_of(largest_bits(most));
  *scale_out = scale;
  if (!live(scale)) {
    memset(q, 0, static_cast<size_t>(columns));
    return;
  }
  const Vec divisor = set1(scale);
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) rounded(load(row + c), divisor, nullptr, q + c);
  if (c < columns) {
    int8_t rest[kLanes];
    rounded(load(row + c), divisor, nullptr, rest);
    memcpy(q + c, rest, static_cast<size_t>(columns - c));
  }
}

template <class B, class S, bool kDrop, bool kInt8>
void forward_rows(const Forward& a, const float* weight, const float* bias, const float* layerscale, int64_t begin,
                  int64_t end, float* lines) {
  const int64_t columns = a.size[3], line = padded(columns);
  float* const wide = lines;  // the row in float32
  const Walk xs(a.x, a, lines + line), residuals(a.residual, a, lines + 2 * line);
  const Walk ys(a.y, a, nullptr), zs(a.z, a, nullptr), rowscales(a.rowscale, a, nullptr);
  const bool stream_y = streams(a, a.y), stream_z = streams(a, a.z);
  const bool rms = a.norm == dropout_add_norm::kRms, norm = a.norm != dropout_add_norm::kNone;
  Philox philox = Philox::make(a.key);

  for (int64_t r = begin; r < end; ++r) {
    const Row x = xs.row(r), residual = residuals.row(r), y = ys.row(r), z = zs.row(r);
    const Vec scale = set1(a.rowscale.data ? a.keep_scale * rowscales.value(r) : a.keep_scale);
    if (kDrop) philox.set_row(row_number(a, r));

    // z, and the sum of z or of its squares
    Keep keep;
    const auto branch = [&](int k, int64_t c, int n) __attribute__((always_inline)) {
      Vec s = kDrop ? keep.choose(k, scale) : scale;
      if (layerscale) s = s * load_some(layerscale + c, n);
      Access<B>::ahead(x, c, k);
      Vec v = Access<B>::load(x, c, n) * s;
      if (residual.data) {
        Access<S>::ahead(residual, c, k);
        v = Access<S>::load(residual, c, n) + v;
      }
      v = Access<S>::put(z, c, v, n, stream_z);
      if (norm) store(wide + c, v);
      return rms ? v * v : v;
    };
    Vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    int64_t c = 0;
    for (; c + kBlock <= columns; c += kBlock) {
      if (kDrop) keep.draw(philox, c / 8, a.threshold);
#pragma GCC unroll 2
      for (int k = 0; k < 8; k += 4) {
        s0 = s0 + branch(k, c + kLanes * k, kLanes);
        s1 = s1 + branch(k + 1, c + kLanes * (k + 1), kLanes);
        s2 = s2 + branch(k + 2, c + kLanes * (k + 2), kLanes);
        s3 = s3 + branch(k + 3, c + kLanes * (k + 3), kLanes);
      }
    }
    if (c < columns) {
      if (kDrop) keep.draw(philox, c / 8, a.threshold);
      Vec rest = zero();
      for (int k = 0; c < columns; ++k, c += kLanes) {
        rest = rest + branch(k, c, columns - c < kLanes ? static_cast<int>(columns - c) : kLanes);
      }
      s0 = s0 + rest;
    }
    if (!norm) continue;
    float squares = sum((s0 + s1) + (s2 + s3));
    float mean = 0.0f;
    if (!rms) {
      mean = squares / static_cast<float>(columns);
      squares = sum_of_squares(wide, mean, columns);
    }
    const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(columns) + a.eps);
    if (!rms) a.mean[r] = mean;
    a.rstd[r] = rstd;

    const Vec vmean = set1(mean), vrstd = set1(rstd);
    Vec most = zero();
    const auto normalise = [&](int64_t c, int n) __attribute__((always_inline)) {
      Vec v = (load(wide + c) - vmean) * vrstd;
      if (weight) v = v * load_some(weight + c, n);
      if (bias) v = v + load_some(bias + c, n);
      v = Access<B>::put(y, c, v, n, stream_y);
      if (kInt8) {
        if (n != kLanes) v = first(v, n);
        store(wide + c, v);
        most = larger_bits(most, without_sign(v));
      }
    };
    c = 0;
#pragma GCC unroll 4
    for (; c + kLanes <= columns; c += kLanes) normalise(c, kLanes);
    if (c < columns) normalise(c, static_cast<int>(columns - c));
    if (kInt8) int8_row(wide, most, columns, a.q + r * columns, a.q_scale + r);
  }
}

template <bool kDrop, bool kInt8>
void forward_instance(int instance, const Forward& a, const float* w, const float* b, const float* l, int64_t begin,
                      int64_t end, float* lines) {
  switch (instance) {
    case 0:
      return forward_rows<F32, F32, kDrop, kInt8>(a, w, b, l, begin, end, lines);
    case 1:
      return forward_rows<BF16, BF16, kDrop, kInt8>(a, w, b, l, begin, end, lines);
    case 2:
      return forward_rows<F16, F16, kDrop, kInt8>(a, w, b, l, begin, end, lines);
    case 3:
      return forward_rows<BF16, F32, kDrop, kInt8>(a, w, b, l, begin, end, lines);
    case 4:
      return forward_rows<F16, F32, kDrop, kInt8>(a, w, b, l, begin, end, lines);
    default:
      return forward_rows<Any, Any, kDrop, kInt8>(a, w, b, l, begin, end, lines);
  }
}

}  // namespace

void dropout_add_norm_forward(const Forward& a, float* workspace) {
  const int64_t columns = a.size[3], line = padded(columns);
  float* const shared = workspace + a.threads * dropout_add_norm::kForwardLines * line;
  const float* weight = parameter(a.weight, a.weight_offset, columns, shared);
  const float* bias = parameter(a.bias, 0.0f, columns, shared + line);
  const float* layerscale = parameter(a.layerscale, 0.0f, columns, shared + 2 * line);
  Types types;
  types.of_branch(a.x);
  types.of_branch(a.y);
  types.of_stream(a.residual);
  types.note(types.stream, a.z, true);
  const int instance = types.instance();
  on_threads(a.threads, [&](int thread, int threads) {
    float* const lines = workspace + thread * dropout_add_norm::kForwardLines * line;
    const int64_t begin = a.rows * thread / threads, end = a.rows * (thread + 1) / threads;
    if (a.q) {
      (a.drop ? forward_instance<true, true> : forward_instance<false, true>)(instance, a, weight, bias, layerscale,
                                                                              begin, end, lines);
    } else if (a.drop) {
      forward_instance<true, false>(instance, a, weight, bias, layerscale, begin, end, lines);
    } else {
      forward_instance<false, false>(instance, a, weight, bias, layerscale, begin, end, lines);
    }
    if (a.stream) stream_fence();
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
