// The C++ interface of fastlm's compiled core: raw addresses, shapes, strides, and a thread count or a stream.
// No torch header anywhere in csrc/: one build serves every torch release.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fastlm {

// A tensor at the border: {address, dtype, stride0, stride1, stride2, stride3}; strides in elements, address 0 =
// absent. Which axes the four strides belong to is said at each function.
using Tensor = std::array<int64_t, 6>;
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kBool = 3, kInt32 = 4, kInt64 = 5, kInt8 = 6 };

// --- what this build is ---
std::string cpu_isa();         // the instruction set in use: "portable", "avx2" or "avx512"
std::string cpu_isa_reason();  // why not a better one, "" if there is none
std::string cuda_archs();      // "" when built without CUDA
int cuda_device_count();       // 0 when built without CUDA, or without a driver or device
void copy_nontemporal(uintptr_t from, uintptr_t to, int64_t bytes, int threads);  // on CPUs; a ceiling for benchmarks
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// --- dropout_add_norm: rows over three leading axes of sizes {n0, n1, n2}, columns last ---
// Row tensors carry strides {n0, n1, n2, column}; vectors of [columns] use the last stride alone; rowscale and offset
// use the first three (offset 0-d: all strides 0 and offset_per_row false). y, z contiguous; mean, rstd float32 [rows].
using Sizes = std::array<int64_t, 4>;  // {n0, n1, n2, columns}
void dropout_add_norm_forward_cpu(Sizes sizes, Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor layerscale,
                                  Tensor rowscale, Tensor seed, Tensor offset, bool offset_per_row, double p,
                                  double eps, double weight_offset, int norm, Tensor y, Tensor z, Tensor mean,
                                  Tensor rstd, int threads);
// And y as int8 too: q contiguous, q_scale float32 [rows].
void dropout_add_norm_int8_cpu(Sizes sizes, Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor layerscale,
                               Tensor rowscale, Tensor seed, Tensor offset, bool offset_per_row, double p, double eps,
                               double weight_offset, int norm, Tensor y, Tensor z, Tensor mean, Tensor rstd, Tensor q,
                               Tensor q_scale, int threads);
void dropout_add_norm_backward_cpu(Sizes sizes, Tensor dy, Tensor dz, Tensor z, Tensor x, Tensor weight,
                                   Tensor layerscale, Tensor rowscale, Tensor mean, Tensor rstd, Tensor seed,
                                   Tensor offset, bool offset_per_row, double p, double weight_offset, int norm,
                                   Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dlayerscale,
                                   int threads);
void dropout_add_norm_forward_cuda(Sizes sizes, Tensor x, Tensor residual, Tensor weight, Tensor bias,
                                   Tensor layerscale, Tensor rowscale, Tensor seed, Tensor offset, bool offset_per_row,
                                   double p, double eps, double weight_offset, int norm, Tensor y, Tensor z,
                                   Tensor mean, Tensor rstd, int device, uintptr_t stream);
void dropout_add_norm_backward_cuda(Sizes sizes, Tensor dy, Tensor dz, Tensor z, Tensor x, Tensor weight,
                                    Tensor layerscale, Tensor rowscale, Tensor mean, Tensor rstd, Tensor seed,
                                    Tensor offset, bool offset_per_row, double p, double weight_offset, int norm,
                                    Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dlayerscale,
                                    Tensor workspace, int device, uintptr_t stream);
// In how many parts the backward sums over rows. Its workspace is float32 [gradients asked for][parts][columns],
// 16-byte aligned; the first of its strides says how many elements it has.
int64_t dropout_add_norm_parts_cuda(int64_t rows);
enum Norm : int { kLayerNorm = 0, kRmsNorm = 1, kNoNorm = 2 };

// --- attention: sizes {batches, query heads, key heads, queries, keys, head size, that of v}; packed: {sequences, ...,
// tokens}
// --- q, k, v, out and their gradients carry strides {batch (packed: 0), head, row, column}; bias {batch, head, query,
// key}. alibi_slopes: its first stride is that of batches, 0 if one row serves all. The rest is contiguous: seed [1],
// batch_ids [batches], cu_seqlens [sequences + 1], seqlens_k [batches], sinks [heads], dsinks [batches, heads], lse,
// rest and dlse [batches, heads, queries] or packed [heads, tokens]. causal 0 none, 1 lower right, 2 upper left, 3 none
// but aligned upper left; left, right -1: unlimited. dbias float32, zeroed, strides 0 along axes it is summed over.
using AttentionSizes = std::array<int64_t, 7>;
void attention_forward_cpu(AttentionSizes sizes, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor alibi_slopes,
                           Tensor seed, Tensor batch_ids, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor seqlens_k,
                           Tensor sinks, int causal, int64_t left, int64_t right, double softcap, double scale,
                           double p, int64_t head0, int64_t q0, int64_t k0, Tensor out, Tensor lse, Tensor rest,
                           int threads);
void attention_backward_cpu(AttentionSizes sizes, Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                            Tensor lse, Tensor rest, Tensor bias, Tensor alibi_slopes, Tensor seed, Tensor batch_ids,
                            Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor seqlens_k, Tensor sinks, int causal,
                            int64_t left, int64_t right, double softcap, double scale, double p, int64_t head0,
                            int64_t q0, int64_t k0, Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dbias,
                            bool dbias_all_batches, bool dbias_all_heads, int threads);
// to += from, element by element in order of memory; 4-D float32, strides of `to` 0 along summed axes.
void reduce_in_order_cpu(std::array<int64_t, 4> sizes, Tensor from, Tensor to);

// --- rotary: sizes {batch, heads, positions, head size}; x and out carry those strides; cos, sin float32
// [table][half]; positions int64, strides {batch, row}, of every row (each) or of the first; absent: 0, 1, ... ---
void rotary_cpu(Sizes sizes, Tensor x, Tensor cos, Tensor sin, Tensor positions, bool each, int64_t table, int64_t half,
                bool interleaved, bool inverse, Tensor out, int threads);

// --- quantize_int8: lines over three leading axes of sizes {n0, n1, n2}, elements of a line last; group 0: one scale a
// line. x and q carry those strides (q's are any), scale float32 {.., line, .., group} {n0, n1, n2, group}. seed
// absent: to nearest. given: the one scale of all. most, float32 [lines], absent or where to put max |x| of each line,
// and then nothing else is written. ---
void quantize_int8_cpu(Sizes sizes, Tensor x, int64_t group, Tensor seed, Tensor given, Tensor q, Tensor scale,
                       Tensor most, int threads);

// --- int8_matmul: sizes {M, N, K}; strides of a {M, K}, of b {K, N}, of a_scale {M}, of b_scale {group, N} and of
// bias {.., N} the last; out contiguous. A floating a: weight-only. ---
void int8_matmul_cpu(std::array<int64_t, 3> sizes, Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, int64_t group,
                     Tensor bias, int activation, Tensor out, int threads);

// --- prune_mask: scores of sizes {n0, n1, n2, columns} with those strides; mask uint8 [rows][ceil(columns/8)]
// contiguous; scale float32 [columns] contiguous or absent. Each returns how many scores are NaN; then no mask counts.
// ---
struct PruneScores {
  Sizes sizes;
  Tensor score, scale, mask;
  bool magnitude;
};
int64_t prune_select_cpu(const std::vector<PruneScores>& scores, int64_t gone, int threads);  // of all together
int64_t prune_rows_cpu(const PruneScores& scores, int64_t gone, int threads);                 // of each row
int64_t prune_groups_cpu(const PruneScores& scores, int keep, int m, int threads);
int64_t prune_transposable_cpu(const PruneScores& scores, int threads);
int64_t prune_blocks_cpu(const PruneScores& scores, int64_t high, int64_t wide, int64_t gone, int threads);
void apply_mask_cpu(Sizes sizes, Tensor weight, Tensor mask, int threads);  // weight strides as of scores
int64_t mask_count_cpu(Tensor mask, int64_t bytes, int threads);
void mask_bits_cpu(Tensor from, Tensor to, int64_t rows, int64_t columns, bool packing, int threads);  // contiguous
// One tensor's part of a selection over several processes: {NaN, keys below low, keys of each bin}; and the mask whose
// keys below `key` go and of those equal to it the first `ties`. Keys: prune_mask.h; at most 2,048 bins of 2^shift.
std::vector<int64_t> prune_histogram_cpu(const PruneScores& scores, int32_t low, int32_t last, int shift, int threads);
void prune_cut_cpu(const PruneScores& scores, int32_t key, int64_t ties, int threads);
// A step of AdamW that holds a mask: all contiguous, mask uint8 [rows][ceil(columns/8)], step float32 [1], raised by
// one but where found_inf is 1; grad_scale and found_inf float32 [1] or absent.
struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
};
void masked_adamw_cpu(int64_t rows, int64_t columns, Tensor weight, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq,
                      Tensor step, Tensor mask, AdamW options, Tensor grad_scale, Tensor found_inf, int threads);
void read_cpu(uintptr_t from, int64_t bytes, int threads);  // what a read costs, for benchmarks

}  // namespace fastlm
