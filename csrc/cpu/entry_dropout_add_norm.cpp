// dropout_add_norm on the CPU: checks the arguments, works out what is the same for every row, picks the instruction
// set.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/philox.h"
#include "cpu/dispatch.h"
#include "cpu/dropout_add_norm.h"
#include "fastlm.h"

namespace fastlm {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 24 * 1024;

dropout_add_norm::Operand operand(const Tensor& t, const char* name, bool needed = false) {
  if (t[0] == 0 && needed) throw std::invalid_argument(std::string("dropout_add_norm: ") + name + " is missing");
  if (t[1] != kFloat32 && t[1] != kBFloat16 && t[1] != kFloat16) {
    throw std::invalid_argument(std::string("dropout_add_norm: ") + name +
                                " must be float32, bfloat16 or float16 (dtype code " + std::to_string(t[1]) + ")");
  }
  return {reinterpret_cast<char*>(t[0]), static_cast<int>(t[1]), {t[2], t[3], t[4], t[5]}};
}

dropout_add_norm::Operand output(const Tensor& t, const char* name, bool needed = false) {
  const dropout_add_norm::Operand out = operand(t, name, needed);
  if (out.data != nullptr && out.stride[3] != 1) {
    throw std::invalid_argument(std::string("dropout_add_norm: ") + name + " must have adjacent columns");
  }
  return out;
}

float* statistic(const Tensor& t, const char* name, bool needed) {
  if (needed && (t[0] == 0 || t[1] != kFloat32)) {
    throw std::invalid_argument(std::string("dropout_add_norm: ") + name + " must be float32 [rows]");
  }
  return reinterpret_cast<float*>(t[0]);
}

const int64_t* integers(const Tensor& t, const char* name, bool needed) {
  if ((needed && t[0] == 0) || (t[0] != 0 && t[1] != kInt64)) {
    throw std::invalid_argument(std::string("dropout_add_norm: ") + name + " must be int64");
  }
  return reinterpret_cast<const int64_t*>(t[0]);
}

// Bytes of the last-level cache that one core can fill: what Linux says of core 0. sysconf adds up the caches of a
// whole server, also in a virtual machine that owns one of them.
int64_t last_level_cache() {
  static const int64_t bytes = [] {
    int64_t size = 0;
    for (int level = 3; level >= 2 && size == 0; --level) {
      const std::string path = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(level) + "/size";
      if (std::FILE* file = std::fopen(path.c_str(), "r")) {
        long long kilobytes = 0;
        if (std::fscanf(file, "%lldK", &kilobytes) == 1) size = kilobytes * 1024;
        std::fclose(file);
      }
    }
    return size > 0 ? size : int64_t{32} << 20;
  }();
  return bytes;
}

// Whether outputs go past the cache: where all that a call reads and writes takes more than half of it, lines of the
// outputs would be fetched from memory to be overwritten, and be gone again before a consumer comes. Counting what is
// read too took a quarter off the time of a bfloat16 [4096, 1024] and nothing off what a following matmul takes.
bool past_the_cache(const dropout_add_norm::Common& a,
                    std::initializer_list<const dropout_add_norm::Operand*> tensors) {
  int64_t bytes = 0;
  for (const dropout_add_norm::Operand* t : tensors) {
    if (t->data != nullptr) bytes += a.rows * a.size[3] * (t->dtype == kFloat32 ? 4 : 2);
  }
  return bytes > last_level_cache() / 2;
}

void set_common(dropout_add_norm::Common& a, const Sizes& sizes, const Tensor& seed, const Tensor& offset,
                bool offset_per_row, double p, double weight_offset, int norm, int threads) {
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] < 0) throw std::invalid_argument("dropout_add_norm: sizes must not be negative");
    a.size[i] = sizes[i];
  }
  a.rows = sizes[0] * sizes[1] * sizes[2];
  if (norm < kLayerNorm || norm > kNoNorm) throw std::invalid_argument("dropout_add_norm: norm must be 0, 1 or 2");
  if (!(p >= 0.0 && p < 1.0)) throw std::invalid_argument("dropout_add_norm: p must be at least 0 and below 1");
  a.norm = norm;
  a.threshold = philox::threshold_of(p);
  a.drop = a.threshold > 0;
  a.keep_scale = a.drop ? philox::keep_scale(a.threshold) : 1.0f;
  const int64_t* seed_at = integers(seed, "seed", a.drop);
  const int64_t* offset_at = integers(offset, "offset", false);
  a.key = (a.drop ? static_cast<uint64_t>(*seed_at) : 0) ^ philox::kKeyDropoutAddNorm;
  a.row_numbers = offset_per_row ? offset_at : nullptr;
  a.row_numbers_stride = offset[4];
  a.first_row = offset_at != nullptr && !offset_per_row && a.drop ? *offset_at : 0;
  a.weight_offset = static_cast<float>(weight_offset);
  a.threads = a.rows * a.size[3] < kParallelElements || threads < 1 ? 1 : threads;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Workspace = std::unique_ptr<float, Free>;

Workspace workspace(int64_t floats) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, static_cast<size_t>(floats) * sizeof(float)) != 0) throw std::bad_alloc();
  return Workspace(static_cast<float*>(p));
}

void run(const dropout_add_norm::Forward& a, float* space) { FASTLM_DISPATCH(dropout_add_norm_forward, a, space); }
void run(const dropout_add_norm::Backward& a, float* space) { FASTLM_DISPATCH(dropout_add_norm_backward, a, space); }

}  // namespace

void dropout_add_norm_forward_cpu(Sizes sizes, Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor layerscale,
                                  Tensor rowscale, Tensor seed, Tensor offset, bool offset_per_row, double p,
                                  double eps, double weight_offset, int norm, Tensor y, Tensor z, Tensor mean,
                                  Tensor rstd, int threads) {
  dropout_add_norm_int8_cpu(sizes, x, residual, weight, bias, layerscale, rowscale, seed, offset, offset_per_row, p,
                            eps, weight_offset, norm, y, z, mean, rstd, Tensor{}, Tensor{}, threads);
}

void dropout_add_norm_int8_cpu(Sizes sizes, Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor layerscale,
                               Tensor rowscale, Tensor seed, Tensor offset, bool offset_per_row, double p, double eps,
                               double weight_offset, int norm, Tensor y, Tensor z, Tensor mean, Tensor rstd, Tensor q,
                               Tensor q_scale, int threads) {
  dropout_add_norm::Forward a;
  set_common(a, sizes, seed, offset, offset_per_row, p, weight_offset, norm, threads);
  if (a.rows == 0 || a.size[3] == 0 || (norm == kNoNorm && z[0] == 0)) return;
  a.x = operand(x, "x", true);
  a.residual = operand(residual, "residual");
  a.weight = operand(weight, "weight");
  a.bias = operand(bias, "bias");
  a.layerscale = operand(layerscale, "layerscale");
  a.rowscale = operand(rowscale, "rowscale");
  a.y = output(y, "y", norm != kNoNorm);
  a.z = output(z, "z");
  a.eps = static_cast<float>(eps);
  a.mean = statistic(mean, "mean", norm == kLayerNorm);
  a.rstd = statistic(rstd, "rstd", norm != kNoNorm);
  if (q[0] != 0 && (q[1] != kInt8 || norm == kNoNorm)) {
    throw std::invalid_argument("dropout_add_norm: q must be int8 [rows, columns], with a norm");
  }
  a.q = reinterpret_cast<int8_t*>(q[0]);
  a.q_scale = statistic(q_scale, "q_scale", a.q != nullptr);
  a.stream = past_the_cache(a, {&a.x, &a.residual, &a.y, &a.z});
  const int64_t lines = a.threads * dropout_add_norm::kForwardLines + dropout_add_norm::kVectors;
  run(a, workspace(lines * dropout_add_norm::padded(a.size[3])).get());
}

void dropout_add_norm_backward_cpu(Sizes sizes, Tensor dy, Tensor dz, Tensor z, Tensor x, Tensor weight,
                                   Tensor layerscale, Tensor rowscale, Tensor mean, Tensor rstd, Tensor seed,
                                   Tensor offset, bool offset_per_row, double p, double weight_offset, int norm,
                                   Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dlayerscale,
                                   int threads) {
  dropout_add_norm::Backward a;
  set_common(a, sizes, seed, offset, offset_per_row, p, weight_offset, norm, threads);
  if (a.size[3] == 0) return;
  const bool normed = dy[0] != 0 && norm != kNoNorm;
  if (a.rows > 0 && !normed && dz[0] == 0) throw std::invalid_argument("dropout_add_norm: dy and dz are both missing");
  a.dy = operand(normed ? dy : Tensor{}, "dy");
  a.dz = operand(dz, "dz");
  a.z = operand(normed ? z : Tensor{}, "z", normed);
  a.x = operand(dlayerscale[0] != 0 ? x : Tensor{}, "x", a.rows > 0 && dlayerscale[0] != 0);
  a.weight = operand(normed ? weight : Tensor{}, "weight");
  a.layerscale = operand(layerscale, "layerscale");
  a.rowscale = operand(rowscale, "rowscale");
  a.mean = statistic(mean, "mean", normed && norm == kLayerNorm);
  a.rstd = statistic(rstd, "rstd", normed);
  a.dx = output(dx, "dx");
  a.dresidual = output(dresidual, "dresidual");
  a.dweight = output(dweight, "dweight");
  a.dbias = output(dbias, "dbias");
  a.dlayerscale = output(dlayerscale, "dlayerscale");
  if (!normed && a.rows > 0 && (a.dweight.data != nullptr || a.dbias.data != nullptr)) {
    throw std::invalid_argument("dropout_add_norm: dweight and dbias need dy and a norm");
  }
  a.stream = past_the_cache(a, {&a.dy, &a.dz, &a.z, &a.dx, &a.dresidual});
  const int64_t lines =
      a.threads * dropout_add_norm::kBackwardLines + dropout_add_norm::kVectors + 3 * dropout_add_norm::blocks(a.rows);
  run(a, workspace(lines * dropout_add_norm::padded(a.size[3])).get());
}
}  // namespace fastlm
