// Pruning masks by groups, by transposable groups and by blocks: pieces of rows to the threads. The loops are in
// prune_mask.cpp.
#include "cpu/prune_mask_entry.h"

namespace fastlm {
using namespace prune_entry;
FASTLM_DECLARE(bool, prune_groups, (const float*, int64_t, int, int, uint8_t*))
FASTLM_DECLARE(bool, prune_transposable, (const float* const*, int64_t, uint8_t* const*))
FASTLM_DECLARE(bool, prune_row_lanes, (const float*, int64_t, float*))
FASTLM_DECLARE(bool, prune_column_lanes, (const float*, int64_t, float*))
FASTLM_DECLARE(float, prune_tree, (const float*))

namespace {
bool groups(const float* x, int64_t n, int keep, int m, uint8_t* out) {
  FASTLM_DISPATCH(prune_groups, x, n, keep, m, out);
}
bool transposable(const float* const* x, int64_t n, uint8_t* const* out) {
  FASTLM_DISPATCH(prune_transposable, x, n, out);
}
bool row_lanes(const float* x, int64_t n, float* lanes) { FASTLM_DISPATCH(prune_row_lanes, x, n, lanes); }
bool column_lanes(const float* x, int64_t n, float* sums) { FASTLM_DISPATCH(prune_column_lanes, x, n, sums); }
float tree(const float* lanes) { FASTLM_DISPATCH(prune_tree, lanes); }

// The lowest `gone` of sums, of equal ones the first; true where it goes.
std::vector<char> lowest(const std::vector<float>& sums, int64_t gone) {
  std::vector<int64_t> order(sums.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  const auto before = [&](int64_t a, int64_t b) {
    const int32_t x = key_of(sums[a]), y = key_of(sums[b]);
    return x != y ? x < y : a < b;
  };
  if (gone > 0 && gone < static_cast<int64_t>(order.size())) {
    std::nth_element(order.begin(), order.begin() + gone, order.end(), before);
  }
  std::vector<char> out(sums.size(), 0);
  for (int64_t i = 0; i < gone; ++i) out[order[i]] = 1;
  return out;
}

void fill(uint8_t* mask, int64_t columns, bool keep) {
  std::memset(mask, keep ? 0xFF : 0, static_cast<size_t>((columns + 7) / 8));
  if (keep && columns % 8) mask[columns / 8] = static_cast<uint8_t>((1 << (columns % 8)) - 1);
}
}  // namespace

int64_t prune_groups_cpu(const PruneScores& scores, int keep, int m, int threads) {
  const View v = view(scores);
  if (m < 2 || m > 32 || keep < 1 || keep >= m) throw std::invalid_argument("prune_mask: no such pattern n:m");
  int64_t step = m;  // a piece is of whole groups and of whole bytes
  while (step % 8) step += m;
  step = kPiece / step * step;
  const int64_t cut = (v.columns + step - 1) / step, all = v.rows * cut;
  const int used = threads_for(v.rows * v.columns, threads);
  std::vector<char> nan(used, 0);
  parallel(used, [&](int t) {
    float buffer[kPiece];
    for (int64_t p = part(all, t, used); p < part(all, t + 1, used); ++p) {
      const int64_t r = p / cut, at = p % cut * step, n = std::min(step, v.columns - at);
      const float* x = fetch(v.row(r), at, n, buffer);
      nan[t] |= groups(x, n, keep, m, v.mask + r * v.bytes + at / 8);
    }
  });
  return std::count(nan.begin(), nan.end(), 0) == used ? 0 : nan_of({v});
}

int64_t prune_transposable_cpu(const PruneScores& scores, int threads) {
  const View v = view(scores);
  if (v.rows % 4 || v.columns % 4) throw std::invalid_argument("prune_mask: 2:4t needs multiples of 4");
  const int64_t all = v.rows / 4 * v.pieces;
  const int used = threads_for(v.rows * v.columns, threads);
  std::vector<char> nan(used, 0);
  parallel(used, [&](int t) {
    float buffers[4][kPiece];
    const float* rows[4];
    uint8_t* out[4];
    for (int64_t p = part(all, t, used); p < part(all, t + 1, used); ++p) {
      const int64_t r = p / v.pieces * 4, at = p % v.pieces * kPiece, n = std::min(kPiece, v.columns - at);
      for (int i = 0; i < 4; ++i) {
        rows[i] = fetch(v.row(r + i), at, n, buffers[i]);
        out[i] = v.mask + (r + i) * v.bytes + at / 8;
      }
      nan[t] |= transposable(rows, n, out);
    }
  });
  return std::count(nan.begin(), nan.end(), 0) == used ? 0 : nan_of({v});
}

// Rows go (high 1, wide = columns), columns (high = rows, wide 1), or blocks. Sums over sixteen lanes and a tree.
int64_t prune_blocks_cpu(const PruneScores& scores, int64_t high, int64_t wide, int64_t gone, int threads) {
  const View v = view(scores);
  if (v.rows == 0) return 0;
  if (high < 1 || wide < 1) throw std::invalid_argument("prune_mask: a block has one row and one column at least");
  const int64_t down = (v.rows + high - 1) / high, across = (v.columns + wide - 1) / wide;
  if (gone < 0 || gone > down * across) throw std::invalid_argument("prune_mask: more are to go than there are");
  std::vector<float> sums(static_cast<size_t>(down * across));
  const int used = threads_for(v.rows * v.columns, threads);
  std::vector<char> nan(used, 0);
  const bool columns = wide == 1 && high >= v.rows;
  constexpr int64_t kStrip = 256;
  parallel(used, [&](int t) {
    std::vector<float> lanes;
    float buffer[kPiece];
    if (columns) {
      lanes.resize(16 * kStrip);
      const int64_t strips = (v.columns + kStrip - 1) / kStrip;
      for (int64_t s = part(strips, t, used); s < part(strips, t + 1, used); ++s) {
        const int64_t at = s * kStrip, n = std::min(kStrip, v.columns - at);
        std::fill(lanes.begin(), lanes.end(), 0.0f);
        for (int64_t r = 0; r < v.rows; ++r) {
          nan[t] |= column_lanes(fetch(v.row(r), at, n, buffer), n, lanes.data() + r % 16 * kStrip);
        }
        for (int64_t c = 0; c < n; ++c) {
          float of[16];
          for (int i = 0; i < 16; ++i) of[i] = lanes[i * kStrip + c];
          sums[at + c] = tree(of);
        }
      }
      return;
    }
    lanes.resize(static_cast<size_t>(across) * 16);
    for (int64_t band = part(down, t, used); band < part(down, t + 1, used); ++band) {
      std::fill(lanes.begin(), lanes.end(), 0.0f);
      for (int64_t r = band * high; r < std::min(v.rows, (band + 1) * high); ++r) {
        for (int64_t at = 0; at < v.columns; at += kPiece) {
          const int64_t n = std::min(kPiece, v.columns - at);
          const float* x = fetch(v.row(r), at, n, buffer);
          if (across == 1 && high == 1) {
            nan[t] |= row_lanes(x, n, lanes.data());
            continue;
          }
          for (int64_t i = 0; i < n; ++i) {
            const int64_t block = (at + i) / wide, within = (r - band * high) * wide + (at + i) % wide;
            lanes[block * 16 + within % 16] += x[i];
            nan[t] |= x[i] != x[i];
          }
        }
      }
      for (int64_t b = 0; b < across; ++b) sums[band * across + b] = tree(lanes.data() + b * 16);
    }
  });
  if (std::count(nan.begin(), nan.end(), 0) != used) return nan_of({v});
  const std::vector<char> goes = lowest(sums, gone);
  for (int64_t band = 0; band < down; ++band) {
    uint8_t* first = v.mask + band * high * v.bytes;
    fill(first, v.columns, true);
    for (int64_t b = 0; b < across; ++b) {
      if (!goes[band * across + b]) continue;
      for (int64_t c = b * wide; c < std::min(v.columns, (b + 1) * wide); ++c) {
        first[c / 8] &= static_cast<uint8_t>(~(1 << (c & 7)));
      }
    }
    for (int64_t r = band * high + 1; r < std::min(v.rows, (band + 1) * high); ++r) {
      std::memcpy(v.mask + r * v.bytes, first, static_cast<size_t>(v.bytes));
    }
  }
  return 0;
}
}  // namespace fastlm
