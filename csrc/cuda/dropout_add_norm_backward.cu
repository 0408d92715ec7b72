// Dropout, residual add and normalisation on CUDA: backward.
//
//   xhat = (z - mean)*rstd,  d = dy*(weight + weight_offset)
//   g  = rstd*(d - avg(d) - xhat*avg(d*xhat)) + dz            avg over the row; no avg(d) for "rms"
//   dresidual = g,  dx = rowscale*layerscale*mask*g
//   dweight = sum of dy*xhat, dbias = sum of dy, dlayerscale = sum of g*rowscale*dropout(x), over rows
//
// Bound by memory: reads dy, z and dz, writes dresidual and dx, each once (16 bits: 10 bytes an element).
//
// A block takes a fixed number of rows (a function of the shape), adds up its part of the parameter gradients in shared
// memory, where each thread owns its columns, and writes it to the workspace; a second kernel adds the parts in a fixed
// tree. No atomics: the same bits every time.
#include "cuda/dropout_add_norm.cuh"

namespace fastlm {
namespace cuda {
namespace dropout_add_norm {

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
  const ThreadPosition me = thread_position(p.plan);
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
      const LaneColumns at = lane_columns(tile_of(p.plan, me, k), me.lane, split);
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
          parameters<X>(p.weight, lane_columns(tile_of(p.plan, me, k), me.lane, split), columns, weight);
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
      const LaneColumns at = lane_columns(tile_of(p.plan, me, k), me.lane, split);
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
        const LaneColumns at = lane_columns(tile_of(p.plan, me, k), me.lane, split);
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
        const LaneColumns at = lane_columns(tile, lane, split);
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

}  // namespace dropout_add_norm
}  // namespace cuda

using namespace cuda;
using namespace cuda::dropout_add_norm;

namespace {
const char* const kBackward = "dropout_add_norm backward";

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
    kind.note(kind.x, b.x);
    kind.note(kind.x, b.dx);
    kind.note(kind.z, b.z);
    kind.note(kind.z, b.dz);
    kind.note(kind.z, b.dresidual);
    kind.note(kind.y, b.dy);
    kind.note(b.weight);
    kind.note(b.branch.layerscale);
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
