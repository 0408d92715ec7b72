// quantize_int8 on the CPU, compiled once for each instruction set.
//
//   scale = max |x| / 127,  q = clamp(rint(x / scale), -127, 127)
//
// Reads x twice, the second time from the cache, and writes a byte an element. A maximum of magnitudes is one of their
// bits as integers, where a NaN is above all. Lines whose elements lie apart while lines are neighbours (columns of a
// matrix) go sixteen at a time. Division and rounding are the processor's, correctly rounded: the same bits everywhere.
#include "cpu/quantize_int8.h"

#include "common/philox.h"
#include "cpu/int8_round.h"

namespace fastlm {
namespace FASTLM_ISA {

using quantize_int8_call::Call;

namespace {

// The random units of elements [from, from + 16) of a row.
FASTLM_NOINLINE void draw(uint64_t key, int64_t row, int64_t from, float* units) {
  for (int c = 0; c < 2; ++c) {
    const philox::Words words = philox::philox4x32(
        {{static_cast<uint32_t>(from / 8 + c), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0}},
        static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
    for (int i = 0; i < 8; ++i) units[8 * c + i] = static_cast<float>(philox::bits_of(words, i)) * 0x1p-16f;
  }
}

FASTLM_INLINE int part(int64_t left) { return left < kLanes ? static_cast<int>(left) : kLanes; }

struct Place {
  const char* x;
  int8_t* q;
  float* scale;
};
FASTLM_INLINE Place place_of(const Call& a, int64_t line) {
  const int64_t i2 = line % a.size[2], rest = line / a.size[2], i1 = rest % a.size[1], i0 = rest / a.size[1];
  return {a.x + (i0 * a.x_stride[0] + i1 * a.x_stride[1] + i2 * a.x_stride[2]) * size_of(a.x_dtype),
          a.q + i0 * a.q_stride[0] + i1 * a.q_stride[1] + i2 * a.q_stride[2],
          a.scale + i0 * a.scale_stride[0] + i1 * a.scale_stride[1] + i2 * a.scale_stride[2]};
}

// One line.
void one_line(const Call& a, int64_t line) {
  const Place p = place_of(a, line);
  const int64_t step = a.x_stride[3], bytes = step * size_of(a.x_dtype), out = a.q_stride[3];
  for (int64_t begin = 0, g = 0; begin < a.size[3]; begin += a.group, ++g) {
    const int64_t end = begin + a.group < a.size[3] ? begin + a.group : a.size[3];
    float scale;
    if (a.given) {
      scale = *a.given;
    } else {
      Vec most = zero();
      for (int64_t i = begin; i < end; i += kLanes) {
        most = larger_bits(most, without_sign(load_strided(p.x + i * bytes, a.x_dtype, step, part(end - i))));
      }
      if (a.most) {
        a.most[line] = largest_bits(most);
        continue;
      }
      scale = scale_of(largest_bits(most));
      p.scale[g * a.scale_stride[3]] = scale;
    }
    for (int64_t i = begin; i < end; i += kLanes) {
      const int n = part(end - i);
      int8_t values[kLanes] = {};
      if (live(scale)) {
        float units[kLanes];
        if (a.random) draw(a.key, line, i, units);
        rounded(load_strided(p.x + i * bytes, a.x_dtype, step, n), set1(scale), a.random ? units : nullptr, values);
      }
      if (out == 1 && n == kLanes) {
        memcpy(p.q + i, values, kLanes);
      } else {
        for (int j = 0; j < n; ++j) p.q[(i + j) * out] = values[j];
      }
    }
  }
}

// n <= 16 neighbouring lines at once.
void neighbours(const Call& a, int64_t line, int n) {
  const Place p = place_of(a, line);
  const int64_t bytes = a.x_stride[3] * size_of(a.x_dtype);
  for (int64_t begin = 0, g = 0; begin < a.size[3]; begin += a.group, ++g) {
    const int64_t end = begin + a.group < a.size[3] ? begin + a.group : a.size[3];
    Vec most = zero();
    for (int64_t i = begin; i < end; ++i)
      most = larger_bits(most, without_sign(load_part(p.x + i * bytes, a.x_dtype, n)));
    float each[kLanes];
    store(each, most);
    uint32_t dead = 0;
    for (int j = 0; j < kLanes; ++j) {
      each[j] = scale_of(each[j]);
      if (j < n) p.scale[j * a.scale_stride[2] + g * a.scale_stride[3]] = each[j];
      if (!live(each[j])) dead |= 1u << j, each[j] = 1.0f;
    }
    const Vec scale = load(each);
    for (int64_t i = begin; i < end; ++i) {
      int8_t values[kLanes];
      rounded(select(dead, zero(), load_part(p.x + i * bytes, a.x_dtype, n)), scale, nullptr, values);
      int8_t* q = p.q + i * a.q_stride[3];
      if (n == kLanes && a.q_stride[2] == 1) {
        memcpy(q, values, kLanes);
      } else {
        for (int j = 0; j < n; ++j) q[j * a.q_stride[2]] = values[j];
      }
    }
  }
}

bool abreast(const Call& a) {
  return a.x_stride[3] != 1 && a.x_stride[2] == 1 && !a.random && !a.given && !a.most && a.size[3] > 1;
}

void lines(const Call& a, int64_t begin, int64_t end) {
  if (!abreast(a)) {
    for (int64_t line = begin; line < end; ++line) one_line(a, line);
    return;
  }
  for (int64_t line = begin; line < end;) {
    const int64_t left = a.size[2] - line % a.size[2];
    const int n = part(left < end - line ? left : end - line);
    neighbours(a, line, n);
    line += n;
  }
}

}  // namespace

void quantize_int8(const Call& a) {
  const int64_t count = a.size[0] * a.size[1] * a.size[2];
#ifdef _OPENMP
  if (a.threads > 1) {
#pragma omp parallel num_threads(a.threads)
    {
      // Whole sixteens, so that neighbours stay together.
      const int64_t sixteens = (count + 15) / 16, t = omp_get_thread_num(), of = omp_get_num_threads();
      const int64_t end = sixteens * (t + 1) / of * 16;
      lines(a, sixteens * t / of * 16, end < count ? end : count);
    }
    return;
  }
#endif
  lines(a, 0, count);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
