// dropout_add_norm on the CPU, backward, compiled once for each instruction set.
//
//   d = dy * (weight + offset);  xhat = (z - mean) * rstd
//   g = rstd * (d - mean(d * xhat) * xhat - mean(d)) + dz
//   dresidual = g;  dx = rowscale * layerscale * mask * g
//   over rows: dweight = sum of dy * xhat, dbias = sum of dy, dlayerscale = sum of g * rowscale * dropout(x)
//
// Reads dy, z and dz once from memory (dy and z again from cache), writes dx and dresidual once. Sums as in forward.
#include "cpu/dropout_add_norm_rows.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

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
  const bool norm = a.dy.data != nullptr, layer = a.norm == dropout_add_norm::kLayer;
  Philox philox = Philox::make(a.key);

  for (int64_t r = begin; r < end; ++r) {
    const Row dy = dys.row(r), dz = dzs.row(r), z = zs.row(r), x = xs.row(r), dx = dxs.row(r);
    const Row dresidual = dresiduals.row(r);
    const Vec rstd = set1(norm ? a.rstd[r] : 0.0f), mean = set1(norm && layer ? a.mean[r] : 0.0f);

    Vec mean_d = zero(), mean_dx = zero();  // of d, and of d * xhat
    if (norm) {
      Vec d0 = zero(), d1 = zero(), p0 = zero(), p1 = zero();
      const auto reduce = [&](int64_t c, int n, Vec& sum_d, Vec& sum_dx) __attribute__((always_inline)) {
        Access<B>::ahead_l2(dy, c);  // nine rows are in use; of 1,024 float32 columns 32 KiB hold eight
        Access<S>::ahead_l2(z, c);
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
      if (dz.data) Access<S>::ahead(dz, c, k);
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

void dropout_add_norm_backward(const Backward& a, float* workspace) {
  const int64_t columns = a.size[3], line = padded(columns);
  const int64_t per_block = dropout_add_norm::block_rows(a.rows), blocks = dropout_add_norm::blocks(a.rows);
  float* const shared = workspace + a.threads * dropout_add_norm::kBackwardLines * line;
  const float* weight = parameter(a.weight, a.weight_offset, columns, shared);
  const float* layerscale = parameter(a.layerscale, 0.0f, columns, shared + line);
  float* const partial = shared + dropout_add_norm::kVectors * line;  // [blocks][parameter][line]
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
    float* const lines = workspace + thread * dropout_add_norm::kBackwardLines * line;
    float* const sub = lines + 4 * line;
    Sums sums = {nullptr, nullptr, nullptr};
    float** const slots[3] = {&sums.weight, &sums.bias, &sums.layerscale};
    for (int i = 0, n = 0; i < 3; ++i) {
      if (parameters[i]->data) *slots[i] = sub + line * n++;
    }
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; ++block) {
      const int64_t last = a.rows < (block + 1) * per_block ? a.rows : (block + 1) * per_block;
      float* const mine = partial + block * count * line;
      for (int64_t begin = block * per_block; begin < last; begin += dropout_add_norm::kSubRows) {
        const int64_t end = last < begin + dropout_add_norm::kSubRows ? last : begin + dropout_add_norm::kSubRows;
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
