// Dropout, residual add and normalisation on CUDA: forward.
//
//   z = residual + rowscale*layerscale*dropout(x)             rounded to its dtype, then
//   y = (z - mean)*rstd*(weight + weight_offset) + bias       mean = 0 for "rms"; "none" ends at z
//
// Bound by memory: reads x and residual, writes z and y, each once (16 bits: 8 bytes an element); about 10 instructions
// an element for the random numbers. How a row lies over threads: dropout_add_norm.cuh.
#include "cuda/dropout_add_norm.cuh"

namespace fastlm {
namespace cuda {
namespace dropout_add_norm {

struct Forward {
  Rows rows;
  Plan plan;
  bool split;
  RowTensor x, residual, y, z;
  ColumnVector weight, bias;
  Branch branch;
  float eps, weight_offset;
  int32_t norm;
  float *mean, *rstd;
};

// The rounded z of eight columns, encoded; the values in `z`.
template <int X, int Z>
FASTLM_DEVICE Raw make_z(const Forward& p, const RowBranch& branch, const LaneColumns& at, int lane, bool split,
                         const Raw& x, const Raw& residual, float (&z)[8]) {
  float scale[8];
  branch_scale<X>(p.branch, branch, at, lane, split, p.rows.columns, true, scale);
  decode<X>(p.x.dtype, x, z);
  if (p.residual.data) {
    float r[8];
    decode<Z>(p.residual.dtype, residual, r);
#pragma unroll
    for (int e = 0; e < 8; ++e) z[e] = fmaf(z[e], scale[e], r[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) z[e] *= scale[e];
  }
  const Raw rounded = encode<Z>(p.z.dtype, z);
  decode<Z>(p.z.dtype, rounded, z);
  return rounded;
}

template <int Y>
FASTLM_DEVICE void put_y(const Forward& p, char* row, const LaneColumns& at, bool split, float mean, float rstd,
                         const float (&z)[8]) {
  float y[8], parameter[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) y[e] = (z[e] - mean) * rstd;
  if (p.weight.data) {
    parameters<Y>(p.weight, at, p.rows.columns, parameter);
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] *= parameter[e] + p.weight_offset;
  }
  if (p.bias.data) {
    parameters<Y>(p.bias, at, p.rows.columns, parameter);
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] += parameter[e];
  }
  put<Y>(p.y, row, at, split, p.rows.columns, encode<Y>(p.y.dtype, y));
}

template <int X, int Z, int Y>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Forward p) {
  const bool split = X == kAny ? p.split : X == kFloat32 || Z == kFloat32 || Y == kFloat32;
  const int columns = p.rows.columns;
  const ThreadPosition me = thread_position(p.plan);
  const int64_t row = me.block * p.plan.groups + me.group;
  const bool active = row < p.rows.count;
  const Index index = index_of(p.rows, active ? row : 0);

  Raw x[kTilesPerWarp] = {}, residual[kTilesPerWarp] = {};
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const LaneColumns at = lane_columns(tile_of(p.plan, me, k), me.lane, split);
    if (!active || at.tile * kTile >= columns) continue;
    x[k] = fetch<X>(p.x, row_of(p.x, index), at, split, columns);
    if (p.residual.data) residual[k] = fetch<Z>(p.residual, row_of(p.residual, index), at, split, columns);
  }
  const RowBranch branch = active ? row_branch(p.branch, index, row) : RowBranch{};

  float z[kTilesPerWarp][8] = {}, count = 0.0f, sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const LaneColumns at = lane_columns(tile_of(p.plan, me, k), me.lane, split);
    if (!active || at.tile * kTile >= columns) continue;
    count += static_cast<float>(min(kTile, columns - at.tile * kTile));
    const Raw rounded = make_z<X, Z>(p, branch, at, me.lane, split, x[k], residual[k], z[k]);
    if (p.z.data) put<Z>(p.z, row_of(p.z, index), at, split, columns, rounded);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += inside<X>(at, e, columns) ? z[k][e] : 0.0f;
  }
  if (p.norm == kNoNorm) return;

  // Moments of my warp's columns, then of the block's, then of the cluster's. "rms" takes them about zero.
  Moments m = {count, 0.0f, 0.0f};
  if (p.norm == kLayerNorm) m.mean = warp_sum(sum) / fmaxf(count, 1.0f);
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const LaneColumns at = lane_columns(tile_of(p.plan, me, k), me.lane, split);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float apart = inside<X>(at, e, columns) ? z[k][e] - m.mean : 0.0f;
      m.m2 = fmaf(apart, apart, m.m2);
    }
  }
  m.m2 = warp_sum(m.m2);
  if (p.plan.warps > 1 || p.plan.cluster > 1) {
    float* shared = shared_memory();  // [warps of the block][3], then [3] for the cluster
    float* mine = shared + 3 * (me.group * p.plan.warps + me.part);
    if (me.lane == 0) mine[0] = m.count, mine[1] = m.mean, mine[2] = m.m2;
    __syncthreads();
    const float* other = shared + 3 * (me.group * p.plan.warps + min(me.lane, p.plan.warps - 1));
    m = {other[0], other[1], other[2]};
    if (me.lane >= p.plan.warps) m = {};
    m = merge_moments(m);
    if (p.plan.cluster > 1) {
      float* block = shared + 3 * p.plan.warps;
      if (threadIdx.x == 0) block[0] = m.count, block[1] = m.mean, block[2] = m.m2;
      cluster_sync();
      m = {};
      if (me.lane < p.plan.cluster) {
        m = {cluster_read(block, me.lane), cluster_read(block + 1, me.lane), cluster_read(block + 2, me.lane)};
      }
      m = merge_moments(m);
      cluster_sync();  // no block may leave while another one reads its shared memory
    }
  }
  if (!active) return;
  const float rstd = 1.0f / sqrtf(m.m2 / static_cast<float>(columns) + p.eps);
  if (me.lane == 0 && me.part == 0 && me.rank == 0) {
    if (p.norm == kLayerNorm) p.mean[row] = m.mean;
    p.rstd[row] = rstd;
  }
  char* y = row_of(p.y, index);
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const LaneColumns at = lane_columns(tile_of(p.plan, me, k), me.lane, split);
    if (at.tile * kTile < columns) put_y<Y>(p, y, at, split, m.mean, rstd, z[k]);
  }
}

// Rows of any width: z is computed again in each of three passes.
__global__ void __launch_bounds__(kThreads, 1) forward_stream_kernel(const __grid_constant__ Forward p) {
  const int columns = p.rows.columns, tiles = (columns + kTile - 1) / kTile;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = blockIdx.x;
  const Index index = index_of(p.rows, row);
  const RowBranch branch = row_branch(p.branch, index, row);
  float* shared = shared_memory();
  float mean = 0.0f, rstd = 0.0f;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    Sums sum = {};
#pragma unroll 1
    for (int tile = warp; tile < tiles; tile += kMaxWarps) {
      const LaneColumns at = lane_columns(tile, lane, p.split);
      Raw residual = {};
      const Raw x = fetch<kAny>(p.x, row_of(p.x, index), at, p.split, columns);
      if (p.residual.data) residual = fetch<kAny>(p.residual, row_of(p.residual, index), at, p.split, columns);
      float z[8];
      const Raw rounded = make_z<kAny, kAny>(p, branch, at, lane, p.split, x, residual, z);
      if (pass == 0 && p.z.data) put<kAny>(p.z, row_of(p.z, index), at, p.split, columns, rounded);
      if (pass == 2) {
        put_y<kAny>(p, row_of(p.y, index), at, p.split, mean, rstd, z);
        continue;
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (!inside<kAny>(at, e, columns)) continue;
        sum.first += z[e];
        sum.second = fmaf(z[e] - mean, z[e] - mean, sum.second);
      }
    }
    if (p.norm == kNoNorm) return;
    if (pass == 2) break;
    sum = block_sum(sum, shared + pass * 2 * kMaxWarps, 0, warp, kMaxWarps, lane);
    if (pass == 0 && p.norm == kLayerNorm) mean = sum.first / static_cast<float>(columns);
    if (pass == 1) rstd = 1.0f / sqrtf(sum.second / static_cast<float>(columns) + p.eps);
  }
  if (threadIdx.x == 0) {
    if (p.norm == kLayerNorm) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

}  // namespace dropout_add_norm
}  // namespace cuda

using namespace cuda;
using namespace cuda::dropout_add_norm;

namespace {
const char* const kForward = "dropout_add_norm forward";
}  // namespace

void dropout_add_norm_forward_cuda(Sizes sizes, Tensor x, Tensor residual, Tensor weight, Tensor bias,
                                   Tensor layerscale, Tensor rowscale, Tensor seed, Tensor offset, bool offset_per_row,
                                   double p, double eps, double weight_offset, int norm, Tensor y, Tensor z,
                                   Tensor mean, Tensor rstd, int device, uintptr_t stream) {
  check_norm(norm, kForward);
  Forward f = {};
  f.rows = make_rows(sizes, kForward);
  if (f.rows.count == 0) return;
  need(x, kForward, "x");
  if (norm == kNoNorm) {
    need(z, kForward, "z");
    y = {};
  } else {
    need(y, kForward, "y");
    f.rstd = statistic(rstd, kForward, "rstd");
    if (norm == kLayerNorm) f.mean = statistic(mean, kForward, "mean");
  }
  f.x = make_row_tensor(x, sizes, kForward, "x");
  f.residual = make_row_tensor(residual, sizes, kForward, "residual");
  f.y = make_row_tensor(y, sizes, kForward, "y");
  f.z = make_row_tensor(z, sizes, kForward, "z");  // its dtype counts even where it is not written
  f.weight = make_column_vector(weight, sizes, kForward, "weight");
  f.bias = make_column_vector(bias, sizes, kForward, "bias");
  f.branch = make_branch(sizes, layerscale, rowscale, seed, offset, offset_per_row, p, kForward);
  f.eps = static_cast<float>(eps);
  f.weight_offset = static_cast<float>(weight_offset);
  f.norm = norm;

  Kind kind;
  kind.note(kind.x, f.x);
  kind.note(kind.z, f.residual);
  kind.note(kind.z, f.z);
  kind.note(kind.y, f.y);
  kind.note(f.weight);
  kind.note(f.bias);
  kind.note(f.branch.layerscale);
  if (kind.z != -1 && kind.z != f.z.dtype) kind.vector = false;
  if (kind.z == -1) kind.z = f.z.dtype;
  kind.split = kind.split || f.z.dtype == kFloat32;
  f.split = kind.split;

  DeviceGuard guard(device);
  auto kernel = forward_kernel<kAny, kAny, kAny>;
  if (kind.fits(kFloat32, kFloat32, kFloat32)) {
    kernel = forward_kernel<kFloat32, kFloat32, kFloat32>;
  } else if (kind.fits(kBFloat16, kBFloat16, kBFloat16)) {
    kernel = forward_kernel<kBFloat16, kBFloat16, kBFloat16>;
  } else if (kind.fits(kFloat16, kFloat16, kFloat16)) {
    kernel = forward_kernel<kFloat16, kFloat16, kFloat16>;
  } else if (kind.fits(kBFloat16, kFloat32, kBFloat16)) {
    kernel = forward_kernel<kBFloat16, kFloat32, kBFloat16>;
  }
  const bool wide = f.rows.columns > kTile * kTilesPerWarp * kMaxWarps;
  f.plan = make_plan(f.rows.columns, 4, wide && has_clusters(reinterpret_cast<const void*>(kernel), device));
  Grid grid;
  grid.threads = 32 * f.plan.warps * f.plan.groups;
  if (f.plan.cluster == 0) {
    grid.blocks_x = f.rows.count;
    grid.shared_bytes = 4 * kMaxWarps * sizeof(float);
    launch(forward_stream_kernel, f, grid, device, stream, kForward);
    return;
  }
  grid.blocks_x = (f.rows.count + f.plan.groups - 1) / f.plan.groups * f.plan.cluster;
  grid.shared_bytes = 3 * (f.plan.warps * f.plan.groups + 1) * sizeof(float);
  grid.cluster = f.plan.cluster;
  launch(kernel, f, grid, device, stream, kForward);
}

}  // namespace fastlm
