// What one call of attention is, as the entry hands it to the kernels of an instruction set. Plain data.
#pragma once
#include <stdint.h>

namespace fastlm {

// A tensor by its address, dtype and strides in elements. Axes: batch, head, row, column; batch stride 0 when packed.
struct AttentionView {
  char* p;
  int64_t dtype;
  int64_t s[4];
};

struct Attention {
  int64_t batches, q_heads, k_heads, q_length, k_length;  // packed: sequences, and lengths of all together
  int64_t head_size, v_head_size;                         // of q and k; of v and out
  int64_t longest_q, longest_k;                           // of one sequence
  AttentionView q, k, v, out, bias;                       // bias.p null: none
  AttentionView dout, dq, dk, dv;                         // backward
  const float* alibi;                                     // [q_heads] or [batches, q_heads]
  int64_t alibi_batch;                                    // its batch stride
  const float* sinks;                                     // [q_heads], or null: logits of keys without a value
  const int64_t* batch_ids;
  const int32_t *cu_q, *cu_k, *seqlens_k;
  uint64_t key;        // seed XOR the op's constant
  uint32_t threshold;  // 0: no dropout
  float keep_scale;
  int causal;
  int64_t left, right;  // -1: unlimited
  float softcap;
  double scale;
  int64_t head0, q0, k0;
  float* lse;         // [batches, q_heads, q_length]; packed [q_heads, q_length]
  float* rest;        // as lse: what rounding to float took from it
  float* dsinks;      // [batches, q_heads], zeroed, or null
  const float* dlse;  // as lse, or null
  float* dbias;       // float32, zeroed; strides below; null: not wanted
  int64_t dbias_stride[4];
  bool dbias_in_order;                      // batches or heads share elements of dbias: they take turns
  bool dbias_all_batches, dbias_all_heads;  // which of the two axes dbias has in full
  int threads;
};

// false: no memory for the scratch.
#define FASTLM_ATTENTION_DECLARE(isa)          \
  namespace isa {                              \
  bool attention_forward(const Attention& a);  \
  bool attention_backward(const Attention& a); \
  }
FASTLM_ATTENTION_DECLARE(portable)
FASTLM_ATTENTION_DECLARE(avx2)
FASTLM_ATTENTION_DECLARE(avx512)
#undef FASTLM_ATTENTION_DECLARE

}  // namespace fastlm
