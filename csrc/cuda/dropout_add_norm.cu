// Dropout, residual add and normalisation on CUDA.
//
//   forward    z = residual + rowscale*layerscale*dropout(x)             rounded to its dtype, then
//              y = (z - mean)*rstd*(weight + weight_offset) + bias       mean = 0 for "rms"; "none" ends at z
//   backward   xhat = (z - mean)*rstd,  d = dy*(weight + weight_offset)
//              g  = rstd*(d - avg(d) - xhat*avg(d*xhat)) + dz            avg over the row; no avg(d) for "rms"
//              dresidual = g,  dx = rowscale*layerscale*mask*g
//              dweight = sum of dy*xhat, dbias = sum of dy, dlayerscale = sum of g*rowscale*dropout(x), over rows
//
// Bound by memory: forward reads x and residual and writes z and y, backward reads dy, z and dz and writes dresidual
// and dx, each once (16 bits: 8 and 10 bytes an element); about 10 instructions an element for the random numbers.
//
// A row stays in registers between the passes: a warp holds 512 columns, a block up to 8,192 (narrow rows share a
// block), a thread-block cluster up to 65,536 (sm_90 and newer; sums pass through distributed shared memory). A row
// that is wider still, or needs a cluster on a chip without, is read again in each pass ("stream").
//
// A block of the backward takes a fixed number of rows (a function of the shape), adds up its part of the parameter
// gradients in shared memory, where each thread owns its columns, and writes it to the workspace; a second kernel adds
// the parts in a fixed tree. No atomics: the same bits every time.
#include "cuda/dropout_add_norm.cuh"

namespace fastlm {
namespace cuda {
namespace dan {

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
FASTLM_DEVICE Raw make_z(const Forward& p, const RowBranch& branch, const Place& at, int lane, bool split, const Raw& x,
                         const Raw& residual, float (&z)[8]) {
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
FASTLM_DEVICE void put_y(const Forward& p, char* row, const Place& at, bool split, float mean, float rstd,
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

template <int D>
FASTLM_DEVICE bool inside(const Place& at, int e, int columns) {  // known widths are divisible by 8
  return (D == kAny ? column_of(at, e) : (e < 4 ? at.low : at.high)) < columns;
}

template <int X, int Z, int Y>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Forward p) {
  const bool split = X == kAny ? p.split : X == kFloat32 || Z == kFloat32 || Y == kFloat32;
  const int columns = p.rows.columns;
  const Place2 me = stand(p.plan);
  const int64_t row = me.block * p.plan.groups + me.group;
  const bool active = row < p.rows.count;
  const Index index = index_of(p.rows, active ? row : 0);

  Raw x[kTilesPerWarp] = {}, residual[kTilesPerWarp] = {};
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const Place at = place_of(tile_of(p.plan, me, k), me.lane, split);
    if (!active || at.tile * kTile >= columns) continue;
    x[k] = fetch<X>(p.x, row_of(p.x, index), at, split, columns);
    if (p.residual.data) residual[k] = fetch<Z>(p.residual, row_of(p.residual, index), at, split, columns);
  }
  const RowBranch branch = active ? row_branch(p.branch, index, row) : RowBranch{};

  float z[kTilesPerWarp][8] = {}, count = 0.0f, sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kTilesPerWarp; ++k) {
    const Place at = place_of(tile_of(p.plan, me, k), me.lane, split);
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
    const Place at = place_of(tile_of(p.plan, me, k), me.lane, split);
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
    m = join(m);
    if (p.plan.cluster > 1) {
      float* block = shared + 3 * p.plan.warps;
      if (threadIdx.x == 0) block[0] = m.count, block[1] = m.mean, block[2] = m.m2;
      cluster_sync();
      m = {};
      if (me.lane < p.plan.cluster) {
        m = {cluster_read(block, me.lane), cluster_read(block + 1, me.lane), cluster_read(block + 2, me.lane)};
      }
      m = join(m);
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
    const Place at = place_of(tile_of(p.plan, me, k), me.lane, split);
    if (at.tile * kTile < columns) put_y<Y>(p, y, at, split, m.mean, rstd, z[k]);
  }
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
      const Place at = place_of(tile, lane, p.split);
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

struct Backward {
  Rows rows;
  Plan plan;
  bool split;
  RowTensor dy, dz, z, x, dx, dresidual;
  ColumnVector weight;
  Branch branch;
  float weight_offset;
  int32_t norm;
  const float *mean, *rstd;
  int64_t rows_per_part, parts;
  float* workspace;                           // [sums][parts][columns], of those sums that are wanted
  int32_t dweight, dbias, dlayerscale, sums;  // place of each in the workspace, -1: not wanted
};

// acc += values, at the eight places of one thread: two float4, `step` of them apart.
FASTLM_DEVICE void accumulate(float4* acc, int step, const float (&values)[8]) {
  float4 low = acc[0], high = acc[step];
  low.x += values[0], low.y += values[1], low.z += values[2], low.w += values[3];
  high.x += values[4], high.y += values[5], high.z += values[6], high.w += values[7];
  acc[0] = low, acc[step] = high;
}

// xhat and dy*(weight + offset) of eight columns.
template <int Z, int Y>
FASTLM_DEVICE void normalised(const Backward& p, const Raw& dy, const Raw& z, float mean, float rstd, float (&grad)[8],
                              float (&xhat)[8]) {
  decode<Y>(p.dy.dtype, dy, grad);
  decode<Z>(p.z.dtype, z, xhat);
#pragma unroll
  for (int e = 0; e < 8; ++e) xhat[e] = (xhat[e] - mean) * rstd;
}

template <int X, int Z, int Y>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ Backward p) {
  const bool split = X == kAny ? p.split : X == kFloat32 || Z == kFloat32 || Y == kFloat32;
  const int columns = p.rows.columns, threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const Place2 me = stand(p.plan);
  const int groups = p.plan.groups, warps = p.plan.warps, cluster = p.plan.cluster;
  const bool normed = p.dy.data != nullptr;

  // Shared memory: float4 [sums][tile of the warp][half][thread], then 2 x [warps of the block][2], 2 x [2] for the
  // cluster.
  float4* acc = reinterpret_cast<float4*>(shared_memory()) + thread;
  float* exchange = shared_memory() + static_cast<int64_t>(p.sums) * kTilesPerWarp * 8 * threads;
  for (int i = 0; i < p.sums * kTilesPerWarp * 2; ++i) acc[i * threads] = float4{0.0f, 0.0f, 0.0f, 0.0f};

  const int64_t first = me.block * p.rows_per_part;
  const int64_t last = min(first + p.rows_per_part, p.rows.count);
  int parity = 0;
#pragma unroll 1
  for (int64_t start = first; start < last; start += groups, parity ^= 1) {
    const int64_t row = start + me.group;
    const bool active = row < last;
    const Index index = index_of(p.rows, active ? row : first);

    Raw dy[kTilesPerWarp] = {}, z[kTilesPerWarp] = {}, dz[kTilesPerWarp] = {};
#pragma unroll
    for (int k = 0; k < kTilesPerWarp; ++k) {
      const Place at = place_of(tile_of(p.plan, me, k), me.lane, split);
      if (!active || at.tile * kTile >= columns) continue;
      if (normed) {
        dy[k] = fetch<Y>(p.dy, row_of(p.dy, index), at, split, columns);
        z[k] = fetch<Z>(p.z, row_of(p.z, index), at, split, columns);
      }
      if (p.dz.data) dz[k] = fetch<Z>(p.dz, row_of(p.dz, index), at, split, columns);
    }
    const float rstd = normed && active ? p.rstd[row] : 0.0f;
    const float mean = normed && active && p.norm == kLayerNorm ? p.mean[row] : 0.0f;

    // Beyond the last column dy is 0, so nothing is added there, whatever xhat is.
    float grad[kTilesPerWarp][8] = {}, xhat[kTilesPerWarp][8] = {};
    if (normed) {
      Sums sum = {};
#pragma unroll
      for (int k = 0; k < kTilesPerWarp; ++k) {
        normalised<Z, Y>(p, dy[k], z[k], mean, rstd, grad[k], xhat[k]);
        if (p.dbias >= 0) accumulate(acc + (p.dbias * kTilesPerWarp + k) * 2 * threads, threads, grad[k]);
        if (p.dweight >= 0) {
          float product[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) product[e] = grad[k][e] * xhat[k][e];
          accumulate(acc + (p.dweight * kTilesPerWarp + k) * 2 * threads, threads, product);
        }
        if (p.weight.data) {  // from the L1 cache: held in registers they would cost half of the occupancy
          float weight[8];
          parameters<X>(p.weight, place_of(tile_of(p.plan, me, k), me.lane, split), columns, weight);
#pragma unroll
          for (int e = 0; e < 8; ++e) grad[k][e] *= weight[e] + p.weight_offset;
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          sum.first += grad[k][e];
          sum.second = fmaf(grad[k][e], xhat[k][e], sum.second);
        }
      }
      // Two buffers in turn: a barrier between two uses of one of them is passed in between, so one a row is enough.
      sum = block_sum(sum, exchange + parity * 2 * kMaxWarps, me.group * warps, me.part, warps, me.lane);
      if (cluster > 1) {
        float* block = exchange + 4 * kMaxWarps + 2 * parity;
        if (thread == 0) block[0] = sum.first, block[1] = sum.second;
        cluster_sync();
        sum = {};
        if (me.lane < cluster) sum = {cluster_read(block, me.lane), cluster_read(block + 1, me.lane)};
        sum = {warp_sum(sum.first), warp_sum(sum.second)};
      }
      const float average = p.norm == kLayerNorm ? sum.first / static_cast<float>(columns) : 0.0f;
      const float slope = sum.second / static_cast<float>(columns);
#pragma unroll
      for (int k = 0; k < kTilesPerWarp; ++k) {
#pragma unroll
        for (int e = 0; e < 8; ++e) grad[k][e] = (grad[k][e] - average - xhat[k][e] * slope) * rstd;
      }
    }
    if (!active) continue;  // after the barriers; a whole warp has one row

    const bool branched = p.dx.data || p.dlayerscale >= 0;
    const RowBranch branch = branched ? row_branch(p.branch, index, row) : RowBranch{};
#pragma unroll
    for (int k = 0; k < kTilesPerWarp; ++k) {
      const Place at = place_of(tile_of(p.plan, me, k), me.lane, split);
      if (at.tile * kTile >= columns) continue;
      float other[8];
      if (p.dz.data) {
        decode<Z>(p.dz.dtype, dz[k], other);
#pragma unroll
        for (int e = 0; e < 8; ++e) grad[k][e] += other[e];
      }
      if (p.dresidual.data) {
        put<Z>(p.dresidual, row_of(p.dresidual, index), at, split, columns, encode<Z>(p.dresidual.dtype, grad[k]));
      }
      if (!branched) continue;
      float scale[8];
      branch_scale<X>(p.branch, branch, at, me.lane, split, columns, false, scale);
#pragma unroll
      for (int e = 0; e < 8; ++e) scale[e] *= grad[k][e];
      if (p.dlayerscale >= 0) {
        decode<X>(p.x.dtype, fetch<X>(p.x, row_of(p.x, index), at, split, columns), other);
#pragma unroll
        for (int e = 0; e < 8; ++e) other[e] *= scale[e];
        accumulate(acc + (p.dlayerscale * kTilesPerWarp + k) * 2 * threads, threads, other);
      }
      if (p.dx.data) {
        if (p.branch.layerscale.data) {
          parameters<X>(p.branch.layerscale, at, columns, other);
#pragma unroll
          for (int e = 0; e < 8; ++e) scale[e] *= other[e];
        }
        put<X>(p.dx, row_of(p.dx, index), at, split, columns, encode<X>(p.dx.dtype, scale));
      }
    }
  }

  if (p.sums > 0) {
    __syncthreads();
    if (me.group == 0) {  // one group adds what all groups of the block have, in order
      for (int i = 0; i < p.sums * kTilesPerWarp * 2; ++i) {
        const int half = i % 2, k = i / 2 % kTilesPerWarp, which = i / 2 / kTilesPerWarp;
        float4 sum = acc[i * threads];
        for (int g = 1; g < groups; ++g) {
          const float4 more = acc[i * threads + g * warps * 32];
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        const Place at = place_of(tile_of(p.plan, me, k), me.lane, split);
        const int column = half ? at.high : at.low;
        if (column >= columns) continue;
        float* out = p.workspace + (which * p.parts + me.block) * columns + column;
        if (columns % 4 == 0) {
          *reinterpret_cast<float4*>(out) = sum;
        } else {
          out[0] = sum.x;
          if (column + 1 < columns) out[1] = sum.y;
          if (column + 2 < columns) out[2] = sum.z;
          if (column + 3 < columns) out[3] = sum.w;
        }
      }
    }
  }
  if (cluster > 1) cluster_sync();  // no block may leave while another one reads its shared memory
}

// Rows of any width: everything is read twice, and the sums over rows stand in the workspace, each column one thread's.
__global__ void __launch_bounds__(kThreads, 1) backward_stream_kernel(const __grid_constant__ Backward p) {
  const int columns = p.rows.columns, tiles = (columns + kTile - 1) / kTile;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool normed = p.dy.data != nullptr, split = p.split;
  const int64_t part = blockIdx.x, first = part * p.rows_per_part, last = min(first + p.rows_per_part, p.rows.count);
  const bool branched = p.dx.data || p.dlayerscale >= 0;
#pragma unroll 1
  for (int64_t row = first; row < last; ++row) {
    const Index index = index_of(p.rows, row);
    const RowBranch branch = branched ? row_branch(p.branch, index, row) : RowBranch{};
    const float rstd = normed ? p.rstd[row] : 0.0f;
    const float mean = normed && p.norm == kLayerNorm ? p.mean[row] : 0.0f;
    float average = 0.0f, slope = 0.0f;
#pragma unroll 1
    for (int pass = normed ? 0 : 1; pass < 2; ++pass) {
      Sums sum = {};
#pragma unroll 1
      for (int tile = warp; tile < tiles; tile += kMaxWarps) {
        const Place at = place_of(tile, lane, split);
        float dy[8] = {}, grad[8] = {}, xhat[8] = {}, other[8];
        if (normed) {
          normalised<kAny, kAny>(p, fetch<kAny>(p.dy, row_of(p.dy, index), at, split, columns),
                                 fetch<kAny>(p.z, row_of(p.z, index), at, split, columns), mean, rstd, dy, xhat);
          if (p.weight.data) parameters<kAny>(p.weight, at, columns, other);
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            grad[e] = p.weight.data ? dy[e] * (other[e] + p.weight_offset) : dy[e];
            sum.first += grad[e];
            sum.second = fmaf(grad[e], xhat[e], sum.second);
          }
        }
        if (pass == 0) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) grad[e] = (grad[e] - average - xhat[e] * slope) * rstd;
        if (p.dz.data) {
          decode<kAny>(p.dz.dtype, fetch<kAny>(p.dz, row_of(p.dz, index), at, split, columns), other);
#pragma unroll
          for (int e = 0; e < 8; ++e) grad[e] += other[e];
        }
        if (p.dresidual.data) {
          put<kAny>(p.dresidual, row_of(p.dresidual, index), at, split, columns, encode<kAny>(p.dresidual.dtype, grad));
        }
        float branch_grad[8] = {}, branch_sum[8] = {};
        if (branched) {
          branch_scale<kAny>(p.branch, branch, at, lane, split, columns, false, branch_grad);
#pragma unroll
          for (int e = 0; e < 8; ++e) branch_grad[e] *= grad[e];
          if (p.dlayerscale >= 0) {
            decode<kAny>(p.x.dtype, fetch<kAny>(p.x, row_of(p.x, index), at, split, columns), branch_sum);
#pragma unroll
            for (int e = 0; e < 8; ++e) branch_sum[e] *= branch_grad[e];
          }
          if (p.dx.data) {
            if (p.branch.layerscale.data) {
              parameters<kAny>(p.branch.layerscale, at, columns, other);
#pragma unroll
              for (int e = 0; e < 8; ++e) branch_grad[e] *= other[e];
            }
            put<kAny>(p.dx, row_of(p.dx, index), at, split, columns, encode<kAny>(p.dx.dtype, branch_grad));
          }
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int column = column_of(at, e);
          if (column >= columns) continue;
          float* out = p.workspace + part * columns + column;
          const int64_t step = p.parts * columns;
          if (p.dweight >= 0) out[p.dweight * step] = (row > first ? out[p.dweight * step] : 0.0f) + dy[e] * xhat[e];
          if (p.dbias >= 0) out[p.dbias * step] = (row > first ? out[p.dbias * step] : 0.0f) + dy[e];
          if (p.dlayerscale >= 0) {
            out[p.dlayerscale * step] = (row > first ? out[p.dlayerscale * step] : 0.0f) + branch_sum[e];
          }
        }
      }
      if (pass == 0) {
        sum = block_sum(sum, shared_memory() + (row & 1) * 2 * kMaxWarps, 0, warp, kMaxWarps, lane);
        average = p.norm == kLayerNorm ? sum.first / static_cast<float>(columns) : 0.0f;
        slope = sum.second / static_cast<float>(columns);
      }
    }
  }
}

struct Combine {
  const float* workspace;  // [sums][parts][columns]
  int64_t parts;
  int32_t columns;
  ColumnVector out[3];
};

constexpr int kCombineWarps = 32;

// The sum over parts of 32 columns: each warp adds every 32nd part, and a tree adds the warps.
__global__ void __launch_bounds__(32 * kCombineWarps) combine_kernel(const __grid_constant__ Combine p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int column = static_cast<int>(blockIdx.x) * 32 + lane;
  const float* from = p.workspace + static_cast<int64_t>(blockIdx.y) * p.parts * p.columns + column;
  float sum = 0.0f;
  if (column < p.columns) {
#pragma unroll 4
    for (int64_t part = warp; part < p.parts; part += kCombineWarps) sum += from[part * p.columns];
  }
  float* shared = shared_memory();
  shared[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll
  for (int step = kCombineWarps / 2; step > 0; step >>= 1) {
    if (warp < step) shared[threadIdx.x] += shared[threadIdx.x + step * 32];
    __syncthreads();
  }
  const ColumnVector out = p.out[blockIdx.y];
  if (warp == 0 && column < p.columns) {
    store_scalar(const_cast<char*>(out.data) + column * out.stride, out.dtype, shared[lane]);
  }
}

}  // namespace dan
}  // namespace cuda

using namespace cuda;
using namespace cuda::dan;

namespace {
const char* const kForward = "dropout_add_norm forward";
const char* const kBackward = "dropout_add_norm backward";

void check_norm(int norm, const char* op) {
  if (norm != kLayerNorm && norm != kRmsNorm && norm != kNoNorm) {
    throw std::invalid_argument(std::string("fastlm: ") + op + ": unknown norm");
  }
}

float* statistic(const Tensor& t, const char* op, const char* name) {
  need(t, op, name);
  if (t[1] != kFloat32) throw std::invalid_argument(std::string("fastlm: ") + op + ": " + name + " must be float32");
  return reinterpret_cast<float*>(t[0]);
}

// Rows that one block of the backward takes: a function of the shape alone, so that sums have one order everywhere.
int64_t rows_per_part(int64_t rows) {
  const int64_t few = (rows + 255) / 256, many = (rows + 1023) / 1024;
  const int64_t least = few < 4 ? 4 : few > 32 ? 32 : few;
  return least > many ? least : many;
}
}  // namespace

int64_t dropout_add_norm_parts_cuda(int64_t rows) {
  return rows > 0 ? (rows + rows_per_part(rows) - 1) / rows_per_part(rows) : 0;
}

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
  kind.see(kind.x, f.x);
  kind.see(kind.z, f.residual);
  kind.see(kind.z, f.z);
  kind.see(kind.y, f.y);
  kind.see(f.weight);
  kind.see(f.bias);
  kind.see(f.branch.layerscale);
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

void dropout_add_norm_backward_cuda(Sizes sizes, Tensor dy, Tensor dz, Tensor z, Tensor x, Tensor weight,
                                    Tensor layerscale, Tensor rowscale, Tensor mean, Tensor rstd, Tensor seed,
                                    Tensor offset, bool offset_per_row, double p, double weight_offset, int norm,
                                    Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dlayerscale,
                                    Tensor workspace, int device, uintptr_t stream) {
  check_norm(norm, kBackward);
  Backward b = {};
  b.rows = make_rows(sizes, kBackward);
  if (norm == kNoNorm) dy = {};
  if (!dy[0]) dweight = dbias = weight = z = {};
  Combine c = {};
  const Tensor sums[3] = {dweight, dbias, dlayerscale};
  int32_t* const places[3] = {&b.dweight, &b.dbias, &b.dlayerscale};
  for (int i = 0; i < 3; ++i) {
    *places[i] = sums[i][0] ? b.sums++ : -1;
    if (sums[i][0]) c.out[*places[i]] = make_column_vector(sums[i], sizes, kBackward, "a parameter's gradient");
  }
  b.parts = dropout_add_norm_parts_cuda(b.rows.count);
  DeviceGuard guard(device);
  if (b.rows.count > 0) {
    if (dy[0]) {
      need(z, kBackward, "z");
      b.rstd = statistic(rstd, kBackward, "rstd");
      if (norm == kLayerNorm) b.mean = statistic(mean, kBackward, "mean");
    }
    if (dlayerscale[0]) need(x, kBackward, "x");
    if (b.sums > 0) {
      b.workspace = statistic(workspace, kBackward, "the workspace");
      if (workspace[0] % 16 || workspace[2] < b.sums * b.parts * b.rows.columns) {
        throw std::invalid_argument("fastlm: dropout_add_norm backward: the workspace is too small or not aligned");
      }
    }
    b.dy = make_row_tensor(dy, sizes, kBackward, "dy");
    b.dz = make_row_tensor(dz, sizes, kBackward, "dz");
    b.z = make_row_tensor(z, sizes, kBackward, "z");
    b.x = make_row_tensor(dlayerscale[0] ? x : Tensor{}, sizes, kBackward, "x");
    b.dx = make_row_tensor(dx, sizes, kBackward, "dx");
    b.dresidual = make_row_tensor(dresidual, sizes, kBackward, "dresidual");
    b.weight = make_column_vector(weight, sizes, kBackward, "weight");
    b.branch = make_branch(sizes, layerscale, rowscale, seed, offset, offset_per_row, p, kBackward);
    b.weight_offset = static_cast<float>(weight_offset);
    b.norm = norm;
    b.rows_per_part = rows_per_part(b.rows.count);

    Kind kind;
    kind.see(kind.x, b.x);
    kind.see(kind.x, b.dx);
    kind.see(kind.z, b.z);
    kind.see(kind.z, b.dz);
    kind.see(kind.z, b.dresidual);
    kind.see(kind.y, b.dy);
    kind.see(b.weight);
    kind.see(b.branch.layerscale);
    b.split = kind.split;

    auto kernel = backward_kernel<kAny, kAny, kAny>;
    if (kind.fits(kFloat32, kFloat32, kFloat32)) {
      kernel = backward_kernel<kFloat32, kFloat32, kFloat32>;
    } else if (kind.fits(kBFloat16, kBFloat16, kBFloat16)) {
      kernel = backward_kernel<kBFloat16, kBFloat16, kBFloat16>;
    } else if (kind.fits(kFloat16, kFloat16, kFloat16)) {
      kernel = backward_kernel<kFloat16, kFloat16, kFloat16>;
    } else if (kind.fits(kBFloat16, kFloat32, kBFloat16)) {
      kernel = backward_kernel<kBFloat16, kFloat32, kBFloat16>;
    }
    const bool wide = b.rows.columns > kTile * kTilesPerWarp * kMaxWarps;
    b.plan = make_plan(b.rows.columns, 8, wide && has_clusters(reinterpret_cast<const void*>(kernel), device));
    Grid grid;
    grid.threads = 32 * b.plan.warps * b.plan.groups;
    if (b.plan.cluster == 0) {
      grid.blocks_x = b.parts;
      grid.shared_bytes = 4 * kMaxWarps * sizeof(float);
      launch(backward_stream_kernel, b, grid, device, stream, kBackward);
    } else {
      grid.blocks_x = b.parts * b.plan.cluster;
      grid.shared_bytes = (b.sums * kTilesPerWarp * 8 * grid.threads + 4 * kMaxWarps + 4) * sizeof(float);
      grid.cluster = b.plan.cluster;
      launch(kernel, b, grid, device, stream, kBackward);
    }
  }
  if (b.sums > 0) {
    c.workspace = b.workspace;
    c.parts = b.parts;
    c.columns = b.rows.columns;
    Grid grid;
    grid.blocks_x = (b.rows.columns + 31) / 32;
    grid.blocks_y = b.sums;
    grid.threads = 32 * kCombineWarps;
    grid.shared_bytes = 32 * kCombineWarps * sizeof(float);
    launch(combine_kernel, c, grid, device, stream, "dropout_add_norm backward's sum over rows");
  }
}

}  // namespace fastlm
