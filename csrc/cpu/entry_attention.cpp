// Attention on the CPU as Python calls it: checks what would make the kernels unsafe, packs the arguments, picks the
// instruction set.
#include <new>
#include <stdexcept>

#include "common/philox.h"
#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "fastlm.h"

namespace fastlm {
namespace {

bool is_float(const Tensor& t) { return t[1] == kFloat32 || t[1] == kBFloat16 || t[1] == kFloat16; }

AttentionView view(const Tensor& t, const char* name, bool needed, bool allow_bool = false) {
  if (needed && t[0] == 0) throw std::invalid_argument(std::string("attention: ") + name + " has no memory");
  if (t[0] != 0 && !is_float(t) && !(allow_bool && t[1] == kBool)) {
    throw std::invalid_argument(std::string("attention: ") + name + " must be float32, bfloat16 or float16");
  }
  return {reinterpret_cast<char*>(t[0]), t[1], {t[2], t[3], t[4], t[5]}};
}

template <class T>
T* pointer(const Tensor& t, DType dtype, const char* name) {
  if (t[0] != 0 && t[1] != dtype) throw std::invalid_argument(std::string("attention: ") + name + " has a wrong dtype");
  return reinterpret_cast<T*>(t[0]);
}

int64_t longest(const int32_t* cu, int64_t sequences, int64_t total, const char* name) {
  int64_t most = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t length = static_cast<int64_t>(cu[b + 1]) - cu[b];
    if (cu[b] < 0 || length < 0 || cu[b + 1] > total) {
      throw std::invalid_argument(std::string("attention: ") + name + " must rise from 0 to at most the tokens");
    }
    if (length > most) most = length;
  }
  return most;
}

Attention common(const AttentionSizes& n, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                 const Tensor& alibi, const Tensor& seed, const Tensor& batch_ids, const Tensor& cu_q,
                 const Tensor& cu_k, const Tensor& seqlens_k, const Tensor& sinks, int causal, int64_t left,
                 int64_t right, double softcap, double scale, double p, int64_t head0, int64_t q0, int64_t k0,
                 int threads) {
  for (int64_t size : n) {
    if (size < 0) throw std::invalid_argument("attention: a size is negative");
  }
  Attention a = {};
  a.batches = n[0], a.q_heads = n[1], a.k_heads = n[2], a.q_length = n[3], a.k_length = n[4], a.head_size = n[5];
  a.v_head_size = n[6];
  for (int64_t size : {a.head_size, a.v_head_size}) {
    if (size < 1 || size > 512) throw std::invalid_argument("attention: head sizes must be 1 to 512");
  }
  if (a.k_heads < 1 || a.q_heads % a.k_heads != 0) {
    throw std::invalid_argument("attention: heads of q must be a multiple of those of k");
  }
  a.q = view(q, "q", a.q_length > 0);
  a.k = view(k, "k", a.k_length > 0);
  a.v = view(v, "v", a.k_length > 0);
  a.bias = view(bias, "bias", false, true);
  a.alibi = pointer<const float>(alibi, kFloat32, "alibi_slopes");
  a.alibi_batch = alibi[2];
  a.batch_ids = pointer<const int64_t>(batch_ids, kInt64, "batch_ids");
  a.cu_q = pointer<const int32_t>(cu_q, kInt32, "cu_seqlens_q");
  a.cu_k = pointer<const int32_t>(cu_k, kInt32, "cu_seqlens_k");
  a.sinks = pointer<const float>(sinks, kFloat32, "sinks");
  a.seqlens_k = pointer<const int32_t>(seqlens_k, kInt32, "seqlens_k");
  if ((a.cu_q == nullptr) != (a.cu_k == nullptr)) {
    throw std::invalid_argument("attention: cu_seqlens_q and cu_seqlens_k go together");
  }
  a.longest_q = a.cu_q ? longest(a.cu_q, a.batches, a.q_length, "cu_seqlens_q") : a.q_length;
  a.longest_k = a.cu_k ? longest(a.cu_k, a.batches, a.k_length, "cu_seqlens_k") : a.k_length;
  for (int64_t b = 0; a.seqlens_k && b < a.batches; ++b) {
    if (a.seqlens_k[b] < 0 || a.seqlens_k[b] > a.k_length) {
      throw std::invalid_argument("attention: seqlens_k must lie between 0 and the keys of k");
    }
  }
  constexpr int64_t kUnlimited = int64_t{1} << 40;  // beyond any length, and sums of a few of it do not overflow
  a.causal = causal;
  a.left = left < kUnlimited ? left : kUnlimited;
  a.right = right < kUnlimited ? right : kUnlimited;
  a.softcap = static_cast<float>(softcap), a.scale = scale;
  a.head0 = head0, a.q0 = q0, a.k0 = k0;
  a.keep_scale = 1.0f;
  if (p > 0.0) {
    const auto* value = pointer<const int64_t>(seed, kInt64, "seed");
    if (!value) throw std::invalid_argument("attention: dropout needs a seed");
    a.key = static_cast<uint64_t>(*value) ^ philox::kKeyAttention;
    a.threshold = philox::threshold_of(p);
    a.keep_scale = philox::keep_scale(a.threshold);
  }
  a.threads = threads < 1 ? 1 : threads;
  return a;
}

bool run_forward(const Attention& a) { FASTLM_DISPATCH(attention_forward, a); }
bool run_backward(const Attention& a) { FASTLM_DISPATCH(attention_backward, a); }

}  // namespace

void attention_forward_cpu(AttentionSizes sizes, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor alibi_slopes,
                           Tensor seed, Tensor batch_ids, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor seqlens_k,
                           Tensor sinks, int causal, int64_t left, int64_t right, double softcap, double scale,
                           double p, int64_t head0, int64_t q0, int64_t k0, Tensor out, Tensor lse, Tensor rest,
                           int threads) {
  Attention a = common(sizes, q, k, v, bias, alibi_slopes, seed, batch_ids, cu_seqlens_q, cu_seqlens_k, seqlens_k,
                       sinks, causal, left, right, softcap, scale, p, head0, q0, k0, threads);
  a.out = view(out, "out", a.q_length > 0);
  a.lse = pointer<float>(lse, kFloat32, "lse");
  a.rest = pointer<float>(rest, kFloat32, "rest");
  if (a.q_length == 0 || a.batches == 0 || a.q_heads == 0) return;
  if (!a.lse || !a.rest) throw std::invalid_argument("attention: lse or rest has no memory");
  if (!run_forward(a)) throw std::bad_alloc();
}

void attention_backward_cpu(AttentionSizes sizes, Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                            Tensor lse, Tensor rest, Tensor bias, Tensor alibi_slopes, Tensor seed, Tensor batch_ids,
                            Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor seqlens_k, Tensor sinks, int causal,
                            int64_t left, int64_t right, double softcap, double scale, double p, int64_t head0,
                            int64_t q0, int64_t k0, Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dbias,
                            bool dbias_all_batches, bool dbias_all_heads, int threads) {
  Attention a = common(sizes, q, k, v, bias, alibi_slopes, seed, batch_ids, cu_seqlens_q, cu_seqlens_k, seqlens_k,
                       sinks, causal, left, right, softcap, scale, p, head0, q0, k0, threads);
  const bool rows = a.q_length > 0, keys = a.k_length > 0;
  a.dout = view(dout, "dout", rows);
  a.out = view(out, "out", rows);
  a.dq = view(dq, "dq", rows);
  a.dk = view(dk, "dk", keys);
  a.dv = view(dv, "dv", keys);
  a.lse = pointer<float>(lse, kFloat32, "lse");
  a.rest = pointer<float>(rest, kFloat32, "rest");
  a.dlse = pointer<const float>(dlse, kFloat32, "dlse");
  a.dsinks = pointer<float>(dsinks, kFloat32, "dsinks");
  a.dbias = pointer<float>(dbias, kFloat32, "dbias");
  for (int i = 0; i < 4; ++i) a.dbias_stride[i] = dbias[2 + i];
  a.dbias_all_batches = dbias_all_batches;
  a.dbias_all_heads = dbias_all_heads;
  a.dbias_in_order = a.dbias && (!dbias_all_batches || !dbias_all_heads);
  if (a.batches == 0 || a.q_heads == 0 || (!rows && !keys)) return;
  if (rows && (!a.lse || !a.rest)) throw std::invalid_argument("attention: lse or rest has no memory");
  if (!run_backward(a)) throw std::bad_alloc();
}

void reduce_in_order_cpu(std::array<int64_t, 4> sizes, Tensor from, Tensor to) {
  const float* x = pointer<const float>(from, kFloat32, "from");
  float* y = pointer<float>(to, kFloat32, "to");
  if (!x || !y) return;
  for (int64_t i = 0; i < sizes[0]; ++i) {
    for (int64_t j = 0; j < sizes[1]; ++j) {
      for (int64_t k = 0; k < sizes[2]; ++k) {
        const float* row = x + i * from[2] + j * from[3] + k * from[4];
        float* sum = y + i * to[2] + j * to[3] + k * to[4];
        for (int64_t l = 0; l < sizes[3]; ++l) sum[l * to[5]] += row[l * from[5]];
      }
    }
  }
}

}  // namespace fastlm
