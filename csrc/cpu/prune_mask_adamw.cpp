// AdamW (Loshchilov and Hutter 2019) over weights some of which are pruned: one pass updates them and holds the mask.
//
//   g = grad / grad_scale
//   w = w (1 - lr weight_decay)
//   m = m + (1 - beta1)(g - m)
//   v = beta2 v + ((1 - beta2) g) g
//   w = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// and +0 in w, m and v where the mask has a 0. Products are added fused, as PyTorch's own kernel does on AVX2 and
// AVX-512: where whole vectors go, the bits are the same. Every instruction set gives these bits.
#include "cpu/prune_mask_adamw.h"

#include "cpu/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

using masked_adamw_call::Constants;

#if FASTLM_ISA_avx512
FASTLM_INLINE Vec fused(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTLM_INLINE Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTLM_INLINE Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
FASTLM_INLINE Vec keep(Vec a, uint32_t bits) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v)}; }
#elif FASTLM_ISA_avx2
FASTLM_INLINE Vec fused(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
FASTLM_INLINE Vec divide(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
FASTLM_INLINE Vec root(Vec x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
FASTLM_INLINE __m256 keep8(__m256 x, uint32_t bits) {
  const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i held = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), place);
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(held, place)));
}
FASTLM_INLINE Vec keep(Vec x, uint32_t bits) { return {keep8(x.a, bits), keep8(x.b, bits >> 8)}; }
#else
template <class F>
FASTLM_INLINE Vec each(Vec x, const F& of) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) lanes[i] = of(lanes[i], i);
  return load(lanes);
}
FASTLM_INLINE Vec fused(Vec x, Vec y, Vec z) {
  float b[kLanes], c[kLanes];
  store(b, y), store(c, z);
  return each(x, [&](float a, int i) { return __builtin_fmaf(a, b[i], c[i]); });
}
FASTLM_INLINE Vec divide(Vec x, Vec y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
FASTLM_INLINE Vec root(Vec x) {
  return each(x, [](float a, int) { return __builtin_sqrtf(a); });
}
FASTLM_INLINE Vec keep(Vec x, uint32_t bits) {
  return each(x, [bits](float a, int i) { return bits >> i & 1 ? a : 0.0f; });
}
#endif

struct Step {
  Vec decay, first, beta2, second, root_of, eps, move, grad_scale;
  bool scaled, from_gradient;

  FASTLM_INLINE Step make(const Constants& c) {
    return {set1(c.decay), set1(c.first), set1(c.beta2),      set1(c.second), set1(c.root),
            set1(c.eps),   set1(c.move),  set1(c.grad_scale), c.scaled,       c.base != 0.0f};
  }
  // Updates w, m and v; g is the gradient, and unscaled where it is to be.
  FASTLM_INLINE void run(const Step& s, uint32_t bits, Vec& w, Vec& g, Vec& m, Vec& v) {
    if (s.scaled) g = divide(g, s.grad_scale);
    w = w * s.decay;
    m = fused(s.first, g - m, s.from_gradient ? g : m);
    v = fused(s.second * g, g, v * s.beta2);
    const Vec down = divide(root(v), s.root_of) + s.eps;
    w = w + divide(s.move * m, down);
    w = keep(w, bits), m = keep(m, bits), v = keep(v, bits);
  }
};

FASTLM_INLINE uint32_t sixteen(const uint8_t* mask, int64_t i, int64_t n) {
  const uint32_t low = mask[i / 8];
  return n - i > 8 ? low | static_cast<uint32_t>(mask[i / 8 + 1]) << 8 : low;
}

template <class T>
void run(const Constants& c, int64_t n, void* weight, void* grad, void* first, void* second, const uint8_t* mask) {
  typedef typename T::Element Element;
  Element *w = static_cast<Element*>(weight), *g = static_cast<Element*>(grad);
  Element *m = static_cast<Element*>(first), *v = static_cast<Element*>(second);
  const Step step = Step::make(c);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec a = T::load(w + i), b = T::load(g + i), d = T::load(m + i), e = T::load(v + i);
    Step::run(step, sixteen(mask, i, n), a, b, d, e);
    if (step.scaled) T::store(g + i, T::pack(b));
    T::store(w + i, T::pack(a)), T::store(m + i, T::pack(d)), T::store(v + i, T::pack(e));
  }
  if (i == n) return;
  const int left = static_cast<int>(n - i);
  Vec a = T::load_part(w + i, left), b = T::load_part(g + i, left), d = T::load_part(m + i, left);
  Vec e = T::load_part(v + i, left);
  Step::run(step, sixteen(mask, i, n), a, b, d, e);
  if (step.scaled) T::store_part(g + i, T::pack(b), left);
  T::store_part(w + i, T::pack(a), left), T::store_part(m + i, T::pack(d), left),
      T::store_part(v + i, T::pack(e), left);
}

}  // namespace

// n elements that begin with a byte of the mask; dtype as DType of fastlm.h: 0 float32, 1 bfloat16, 2 float16.
void prune_adamw(const Constants& c, int dtype, int64_t n, void* weight, void* grad, void* first, void* second,
                 const uint8_t* mask) {
  if (dtype == 0) {
    run<F32>(c, n, weight, grad, first, second, mask);
  } else if (dtype == 1) {
    run<BF16>(c, n, weight, grad, first, second, mask);
  } else {
    run<F16>(c, n, weight, grad, first, second, mask);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
