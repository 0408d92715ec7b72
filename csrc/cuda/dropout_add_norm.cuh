// dropout_add_norm on CUDA: what forward and backward share.
//
// A row stays in registers between the passes: a warp holds 512 columns, a block up to 8,192 (narrow rows share a
// block), a thread-block cluster up to 65,536 (sm_90 and newer; sums pass through distributed shared memory). A row
// that is wider still, or needs a cluster on a chip without, is read again in each pass ("stream").
#pragma once
#include "cuda/rows.cuh"

namespace fastlm {
namespace cuda {
namespace dropout_add_norm {

constexpr int kTilesPerWarp = 2;  // a lane holds 16 columns of its row in registers
constexpr int kMaxWarps = 16;     // of a block: 8,192 columns
constexpr int kThreads = 32 * kMaxWarps;
constexpr int kMaxCluster = 8;  // blocks of a cluster, which is as many as every chip promises: 65,536 columns

// Who works on a row: `warps` warps in each of `cluster` blocks; `groups` rows at once in a block.
struct Plan {
  int32_t warps, groups, cluster;
};

// What x is multiplied by on its way into z.
struct Branch {
  const int64_t* seed;  // read on the device, so nothing waits and a CUDA graph replays with new values
  const int64_t* offset;
  bool offset_per_row;
  int64_t offset_stride[3];  // in elements
  uint32_t threshold;        // 0: no dropout
  float keep_scale;
  ColumnVector layerscale;
  RowTensor rowscale;
};

// The branch in one row.
struct RowBranch {
  uint32_t key0, key1, row_low, row_high;
  float scale;  // keep_scale * rowscale
};

FASTLM_DEVICE RowBranch row_branch(const Branch& b, const Index& i, int64_t row) {
  RowBranch r = {0, 0, 0, 0, b.threshold ? b.keep_scale : 1.0f};
  if (b.threshold) {
    const uint64_t key = static_cast<uint64_t>(*b.seed) ^ philox::kKeyDropoutAddNorm;
    r.key0 = static_cast<uint32_t>(key), r.key1 = static_cast<uint32_t>(key >> 32);
    int64_t global = row;
    if (b.offset_per_row) {
      global = b.offset[i.i0 * b.offset_stride[0] + i.i1 * b.offset_stride[1] + i.i2 * b.offset_stride[2]];
    } else if (b.offset) {
      global += *b.offset;
    }
    r.row_low = static_cast<uint32_t>(global);
    r.row_high = static_cast<uint32_t>(static_cast<uint64_t>(global) >> 32);
  }
  if (b.rowscale.data) r.scale *= load_scalar(row_of(b.rowscale, i), b.rowscale.dtype);
  return r;
}

// scale[e] = rowscale * dropout, and with `with_layerscale` * layerscale. All lanes of the warp must call.
template <int D>
FASTLM_DEVICE void branch_scale(const Branch& b, const RowBranch& r, const LaneColumns& at, int lane, bool split,
                                int columns, bool with_layerscale, float (&scale)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) scale[e] = r.scale;
  if (b.threshold) drop(scale, at, lane, split, r.row_low, r.row_high, r.key0, r.key1, b.threshold);
  if (with_layerscale && b.layerscale.data) {
    float layerscale[8];
    parameters<D>(b.layerscale, at, columns, layerscale);
#pragma unroll
    for (int e = 0; e < 8; ++e) scale[e] *= layerscale[e];
  }
}

// Count, mean and sum of squared deviations of a part of a row.
struct Moments {
  float count, mean, m2;
};

// Joins the moments that the lanes hold (Chan, Golub, LeVeque 1983); all lanes get the result.
FASTLM_DEVICE Moments merge_moments(const Moments& m) {
  const float count = warp_sum(m.count);
  const float mean = warp_sum(m.count * m.mean) / count;
  const float apart = m.mean - mean;
  return {count, mean, warp_sum(m.m2) + warp_sum(m.count * apart * apart)};
}

struct Sums {
  float first, second;
};

struct ThreadPosition {  // where a thread stands in its block and its row
  int lane, part, group, rank;
  int64_t block;  // number of the cluster
};

FASTLM_DEVICE ThreadPosition thread_position(const Plan& plan) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  return {static_cast<int>(threadIdx.x) % 32, warp % plan.warps, warp / plan.warps,
          plan.cluster > 1 ? cluster_rank() : 0, static_cast<int64_t>(blockIdx.x) / plan.cluster};
}

FASTLM_DEVICE int tile_of(const Plan& plan, const ThreadPosition& me, int k) {
  return (k * plan.cluster + me.rank) * plan.warps + me.part;
}

// --- host ---
inline Plan make_plan(int columns, int block_warps, bool clusters) {
  const int tiles = (columns + kTile - 1) / kTile;
  int warps = (tiles + kTilesPerWarp - 1) / kTilesPerWarp, cluster = 1;
  if (warps > kMaxWarps) {
    if (!clusters || warps > kMaxWarps * kMaxCluster) return {kMaxWarps, 1, 0};  // cluster 0: the row does not fit
    while (cluster * kMaxWarps < warps) cluster *= 2;
    warps = (tiles + kTilesPerWarp * cluster - 1) / (kTilesPerWarp * cluster);
  }
  return {warps, warps < block_warps && cluster == 1 ? block_warps / warps : 1, cluster};
}

inline Branch make_branch(const Sizes& sizes, const Tensor& layerscale, const Tensor& rowscale, const Tensor& seed,
                          const Tensor& offset, bool offset_per_row, double p, const char* op) {
  if (!(p >= 0.0 && p < 1.0)) throw std::invalid_argument(std::string("fastlm: ") + op + ": p must be in [0, 1)");
  Branch b = {};
  b.threshold = philox::threshold_of(p);
  b.keep_scale = philox::keep_scale(b.threshold);
  if (b.threshold) {
    need(seed, op, "seed");
    if (seed[1] != kInt64 || (offset[0] && offset[1] != kInt64)) {
      throw std::invalid_argument(std::string("fastlm: ") + op + ": seed and offset must be int64");
    }
    if (offset_per_row) need(offset, op, "offset");
  }
  b.seed = reinterpret_cast<const int64_t*>(seed[0]);
  b.offset = reinterpret_cast<const int64_t*>(offset[0]);
  b.offset_per_row = offset_per_row;
  for (int axis = 0; axis < 3; ++axis) b.offset_stride[axis] = offset[2 + axis];
  b.layerscale = make_column_vector(layerscale, sizes, op, "layerscale");
  b.rowscale = make_row_tensor(rowscale, sizes, op, "rowscale");
  return b;
}

// Which instantiation serves: every tensor that is there is aligned and has the dtype of its place in {X, Z, Y}.
struct Kind {
  int x = -1, z = -1, y = -1;  // -1 until a tensor tells
  bool vector = true, split = false;

  void note(int& known, const RowTensor& t) {
    if (!t.data) return;
    split = split || t.dtype == kFloat32;
    vector = vector && t.vector && (known == -1 || known == t.dtype);
    known = t.dtype;
  }
  void note(const ColumnVector& v) { vector = vector && (!v.data || v.vector); }
  bool fits(int want_x, int want_z, int want_y) const {
    return vector && (x == -1 || x == want_x) && (z == -1 || z == want_z) && (y == -1 || y == want_y) &&
           split == (want_x == kFloat32 || want_z == kFloat32 || want_y == kFloat32);
  }
};

template <int D>
FASTLM_DEVICE bool inside(const LaneColumns& at, int e, int columns) {  // known widths are divisible by 8
  return (D == kAny ? column_of(at, e) : (e < 4 ? at.low : at.high)) < columns;
}

// The sums over a block of two values, in a fixed order. `shared`: 2 * kMaxWarps floats that no other call in flight
// uses.
FASTLM_DEVICE Sums block_sum(Sums s, float* shared, int first_warp, int part, int warps, int lane) {
  s = {warp_sum(s.first), warp_sum(s.second)};
  if (warps == 1) return s;
  float* mine = shared + 2 * (first_warp + part);
  if (lane == 0) mine[0] = s.first, mine[1] = s.second;
  __syncthreads();
  const float* other = shared + 2 * (first_warp + min(lane, warps - 1));
  s = {other[0], other[1]};
  if (lane >= warps) s = {};
  return {warp_sum(s.first), warp_sum(s.second)};
}
inline void check_norm(int norm, const char* op) {
  if (norm != kLayerNorm && norm != kRmsNorm && norm != kNoNorm) {
    throw std::invalid_argument(std::string("fastlm: ") + op + ": unknown norm");
  }
}

inline float* statistic(const Tensor& t, const char* op, const char* name) {
  need(t, op, name);
  if (t[1] != kFloat32) throw std::invalid_argument(std::string("fastlm: ") + op + ": " + name + " must be float32");
  return reinterpret_cast<float*>(t[0]);
}

}  // namespace dropout_add_norm
}  // namespace cuda
}  // namespace fastlm
