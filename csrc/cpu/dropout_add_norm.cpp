// dropout_add_norm on the CPU, compiled once for each instruction set.
//
//   forward   z = residual + rowscale * layerscale * dropout(x)     rounded to z's type
//             y = (z - mean) * rstd * (weight + offset) + bias       of the rounded z, rounded once
//             reads x and residual once, writes z and y once: 16 bytes an element in float32, 8 in bfloat16; about 10
//             flops an element, and 0.8 vector instructions of random numbers. The row stays in the first-level cache
//             as float32 between the three passes (z and its sum; the squares about the mean; y).
//   backward  d = dy * (weight + offset);  xhat = (z - mean) * rstd
//             g = rstd * (d - mean(d * xhat) * xhat - mean(d)) + dz;  dresidual = g;  dx = rowscale * layerscale * mask
//             * g dweight = sum of dy * xhat, dbias = sum of dy, dlayerscale = sum of g * rowscale * dropout(x) over
//             rows reads dy, z, dz once from memory (dy and z again from cache), writes dx and dresidual once.
//
// Every sum runs in an order that depends on the shape alone, and nothing contracts a*b+c: the same bits on every
// instruction set and at any thread count.
#include "cpu/dropout_add_norm.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

using dan::Backward;
using dan::Common;
using dan::Forward;
using dan::Operand;
using dan::padded;

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
// absent, and returns the rounded values. ahead asks for what stands a page further on: in a matrix, the next rows.
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

// --- forward ---

template <class B, class S, bool kDrop>
void forward_rows(const Forward& a, const float* weight, const float* bias, const float* layerscale, int64_t begin,
                  int64_t end, float* lines) {
  const int64_t columns = a.size[3], line = padded(columns);
  float* const wide = lines;  // the row in float32
  const Walk xs(a.x, a, lines + line), residuals(a.residual, a, lines + 2 * line);
  const Walk ys(a.y, a, nullptr), zs(a.z, a, nullptr), rowscales(a.rowscale, a, nullptr);
  const bool stream_y = streams(a, a.y), stream_z = streams(a, a.z);
  const bool rms = a.norm == dan::kRms, norm = a.norm != dan::kNone;
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
    const auto normalise = [&](int64_t c, int n) __attribute__((always_inline)) {
      Vec v = (load(wide + c) - vmean) * vrstd;
      if (weight) v = v * load_some(weight + c, n);
      if (bias) v = v + load_some(bias + c, n);
      Access<B>::put(y, c, v, n, stream_y);
    };
    c = 0;
#pragma GCC unroll 4
    for (; c + kLanes <= columns; c += kLanes) normalise(c, kLanes);
    if (c < columns) normalise(c, static_cast<int>(columns - c));
  }
}

// --- backward ---

struct Sums {
  float *weight, *bias, *layerscale;  // of the rows so far, or null
};

FASTLM_INLINE void accumulate(float* p, Vec x) { store(p, load(p) + x); }

template <class B, class S, bool kDrop>
void backward_rows(const Backward& a, const float* weight, const float* layerscale, int64_t begin, int64_t end,
                   const Sums& sums, float* lines) {
  const int64_t columns = a.size[3], line = padded(columns);
  const Walk dys(a.dy, a, lines), dzs(a.dz, a, lines + line), zs(a.z, a, lines + 2 * line);
  const Walk xs(a.x, a, lines + 3 * line), rowscales(a.rowscale, a, nullptr);
  const Walk dxs(a.dx, a, nullptr), dresiduals(a.dresidual, a, nullptr);
  const bool stream_dx = streams(a, a.dx), stream_dresidual = streams(a, a.dresidual);
  const bool norm = a.dy.data != nullptr, layer = a.norm == dan::kLayer;
  Philox philox = Philox::make(a.key);

  for (int64_t r = begin; r < end; ++r) {
    const Row dy = dys.row(r), dz = dzs.row(r), z = zs.row(r), x = xs.row(r), dx = dxs.row(r);
    const Row dresidual = dresiduals.row(r);
    const Vec rstd = set1(norm ? a.rstd[r] : 0.0f), mean = set1(norm && layer ? a.mean[r] : 0.0f);

    Vec mean_d = zero(), mean_dx = zero();  // of d, and of d * xhat
    if (norm) {
      Vec d0 = zero(), d1 = zero(), p0 = zero(), p1 = zero();
      const auto reduce = [&](int64_t c, int n, Vec& sum_d, Vec& sum_dx) __attribute__((always_inline)) {
        const Vec g = Access<B>::load(dy, c, n), xhat = (Access<S>::load(z, c, n) - mean) * rstd;
        const Vec d = weight ? g * load_some(weight + c, n) : g, product = g * xhat;
        if (sums.weight) accumulate(sums.weight + c, product);
        if (sums.bias) accumulate(sums.bias + c, g);
        sum_d = sum_d + d;
        sum_dx = sum_dx + d * xhat;
      };
      int64_t c = 0;
      for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
        reduce(c, kLanes, d0, p0);
        reduce(c + kLanes, kLanes, d1, p1);
      }
      for (; c < columns; c += kLanes) reduce(c, columns - c < kLanes ? static_cast<int>(columns - c) : kLanes, d0, p0);
      const float count = static_cast<float>(columns);
      mean_dx = set1(sum(p0 + p1) / count);
      if (layer) mean_d = set1(sum(d0 + d1) / count);
    }

    const float branch_scale = a.rowscale.data ? a.keep_scale * rowscales.value(r) : a.keep_scale;
    const Vec scale = set1(branch_scale);
    if (kDrop) philox.set_row(row_number(a, r));
    Keep keep;
    const auto piece = [&](int k, int64_t c, int n) __attribute__((always_inline)) {
      Vec g = zero();
      if (norm) {
        const Vec xhat = (Access<S>::load(z, c, n) - mean) * rstd;
        Vec d = Access<B>::load(dy, c, n);
        if (weight) d = d * load_some(weight + c, n);
        g = ((d - xhat * mean_dx) - mean_d) * rstd;
      }
      if (dz.data) g = norm ? g + Access<S>::load(dz, c, n) : Access<S>::load(dz, c, n);
      if (dresidual.data) Access<S>::put(dresidual, c, g, n, stream_dresidual);
      Vec s = kDrop ? keep.choose(k, scale) : scale;
      if (sums.layerscale) accumulate(sums.layerscale + c, g * (Access<B>::load(x, c, n) * s));
      if (layerscale) s = s * load_some(layerscale + c, n);
      if (dx.data) Access<B>::put(dx, c, g * s, n, stream_dx);
    };
    int64_t c = 0;
    for (; c + kBlock <= columns; c += kBlock) {
      if (kDrop) keep.draw(philox, c / 8, a.threshold);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) piece(k, c + kLanes * k, kLanes);
    }
    if (c < columns) {
      if (kDrop) keep.draw(philox, c / 8, a.threshold);
      for (int k = 0; c < columns; ++k, c += kLanes) {
        piece(k, c, columns - c < kLanes ? static_cast<int>(columns - c) : kLanes);
      }
    }
  }
}

// --- launchers ---

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

template <bool kDrop>
void forward_instance(int instance, const Forward& a, const float* w, const float* b, const float* l, int64_t begin,
                      int64_t end, float* lines) {
  switch (instance) {
    case 0:
      return forward_rows<F32, F32, kDrop>(a, w, b, l, begin, end, lines);
    case 1:
      return forward_rows<BF16, BF16, kDrop>(a, w, b, l, begin, end, lines);
    case 2:
      return forward_rows<F16, F16, kDrop>(a, w, b, l, begin, end, lines);
    case 3:
      return forward_rows<BF16, F32, kDrop>(a, w, b, l, begin, end, lines);
    case 4:
      return forward_rows<F16, F32, kDrop>(a, w, b, l, begin, end, lines);
    default:
      return forward_rows<Any, Any, kDrop>(a, w, b, l, begin, end, lines);
  }
}

template <bool kDrop>
void backward_instance(int instance, const Backward& a, const float* w, const float* l, int64_t begin, int64_t end,
                       const Sums& sums, float* lines) {
  switch (instance) {
    case 0:
      return backward_rows<F32, F32, kDrop>(a, w, l, begin, end, sums, lines);
    case 1:
      return backward_rows<BF16, BF16, kDrop>(a, w, l, begin, end, sums, lines);
    case 2:
      return backward_rows<F16, F16, kDrop>(a, w, l, begin, end, sums, lines);
    case 3:
      return backward_rows<BF16, F32, kDrop>(a, w, l, begin, end, sums, lines);
    case 4:
      return backward_rows<F16, F32, kDrop>(a, w, l, begin, end, sums, lines);
    default:
      return backward_rows<Any, Any, kDrop>(a, w, l, begin, end, sums, lines);
  }
}

// Adds the blocks' sums in a fixed tree, for columns begin to end, and writes them in the parameter's type.
void combine(float* partial, int64_t blocks, int64_t step, const Operand& out, int64_t columns, int64_t begin,
             int64_t end) {
  for (int64_t width = 1; width < blocks; width *= 2) {
    for (int64_t i = 0; i + width < blocks; i += 2 * width) {
      float* const into = partial + i * step;
      const float* const from = partial + (i + width) * step;
      for (int64_t c = begin; c < end; c += kLanes) accumulate(into + c, load(from + c));
    }
  }
  for (int64_t c = begin; c < end && c < columns; c += kLanes) {
    const int n = columns - c < kLanes ? static_cast<int>(columns - c) : kLanes;
    Access<Any>::put({out.data, out.dtype}, c, blocks > 0 ? load(partial + c) : zero(), n, false);
  }
}

}  // namespace

void dan_forward(const Forward& a, float* workspace) {
  const int64_t columns = a.size[3], line = padded(columns);
  float* const shared = workspace + a.threads * dan::kForwardLines * line;
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
    float* const lines = workspace + thread * dan::kForwardLines * line;
    const int64_t begin = a.rows * thread / threads, end = a.rows * (thread + 1) / threads;
    if (a.drop) {
      forward_instance<true>(instance, a, weight, bias, layerscale, begin, end, lines);
    } else {
      forward_instance<false>(instance, a, weight, bias, layerscale, begin, end, lines);
    }
    if (a.stream) stream_fence();
  });
}

void dan_backward(const Backward& a, float* workspace) {
  const int64_t columns = a.size[3], line = padded(columns);
  const int64_t per_block = dan::block_rows(a.rows), blocks = dan::blocks(a.rows);
  float* const shared = workspace + a.threads * dan::kBackwardLines * line;
  const float* weight = parameter(a.weight, a.weight_offset, columns, shared);
  const float* layerscale = parameter(a.layerscale, 0.0f, columns, shared + line);
  float* const partial = shared + dan::kVectors * line;  // [blocks][parameter][line]
  const Operand* parameters[3] = {&a.dweight, &a.dbias, &a.dlayerscale};
  int count = 0;
  for (const Operand* t : parameters) count += t->data != nullptr;
  Types types;
  types.of_branch(a.dy);
  types.of_branch(a.x);
  types.of_branch(a.dx);
  types.of_stream(a.z);
  types.of_stream(a.dz);
  types.of_stream(a.dresidual);
  const int instance = types.instance();

  on_threads(a.threads, [&](int thread, int threads) {
    float* const lines = workspace + thread * dan::kBackwardLines * line;
    float* const sub = lines + 4 * line;
    Sums sums = {nullptr, nullptr, nullptr};
    float** const slots[3] = {&sums.weight, &sums.bias, &sums.layerscale};
    for (int i = 0, n = 0; i < 3; ++i) {
      if (parameters[i]->data) *slots[i] = sub + line * n++;
    }
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; ++block) {
      const int64_t last = a.rows < (block + 1) * per_block ? a.rows : (block + 1) * per_block;
      float* const mine = partial + block * count * line;
      for (int64_t begin = block * per_block; begin < last; begin += dan::kSubRows) {
        const int64_t end = last < begin + dan::kSubRows ? last : begin + dan::kSubRows;
        memset(sub, 0, count * line * sizeof(float));
        if (a.drop) {
          backward_instance<true>(instance, a, weight, layerscale, begin, end, sums, lines);
        } else {
          backward_instance<false>(instance, a, weight, layerscale, begin, end, sums, lines);
        }
        const bool fresh = begin == block * per_block;
        for (int64_t c = 0; c < count * line; c += kLanes) {
          store(mine + c, fresh ? load(sub + c) : load(mine + c) + load(sub + c));
        }
      }
    }
    if (a.stream) stream_fence();
    if (count == 0) return;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
    const int64_t pieces = line / 64;
    const int64_t begin = 64 * (pieces * thread / threads), end = 64 * (pieces * (thread + 1) / threads);
    for (int i = 0, n = 0; i < 3; ++i) {
      if (parameters[i]->data) combine(partial + line * n++, blocks, count * line, *parameters[i], columns, begin, end);
    }
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
