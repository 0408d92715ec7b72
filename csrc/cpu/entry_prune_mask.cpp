// Pruning masks on the CPU: which scores go. The loops over a piece of a row are in prune_mask.cpp.
//
// The k lowest of N scores, exactly, without sorting and with a few KiB: a sample gives a range of keys that holds the
// k-th almost surely; one pass counts what lies below and how the range's keys are spread over 2,048 bins; where the
// bin of the k-th holds a single key, or so few scores that they can be told apart one by one, a second pass writes the
// mask, else that bin is the next range. Two reads of the scores for most inputs, four at most but for a sample that
// missed. Ties go by their place: each thread knows from the first pass how many of them the threads before it hold.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/prune_mask.h"
#include "fastlm.h"

namespace fastlm {
using prune_call::Candidate;
using prune_call::Histogram;
using prune_call::Row;
using prune_call::Writer;
FASTLM_DECLARE(const float*, prune_fetch, (const Row&, int64_t, int64_t, float*))
FASTLM_DECLARE(void, prune_count, (const float*, int64_t, int32_t, int32_t, int, Histogram*))
FASTLM_DECLARE(void, prune_write, (const float*, int64_t, Writer*, uint8_t*))
FASTLM_DECLARE(bool, prune_groups, (const float*, int64_t, int, int, uint8_t*))
FASTLM_DECLARE(bool, prune_transposable, (const float* const*, int64_t, uint8_t* const*))
FASTLM_DECLARE(bool, prune_row_lanes, (const float*, int64_t, float*))
FASTLM_DECLARE(bool, prune_column_lanes, (const float*, int64_t, float*))
FASTLM_DECLARE(float, prune_tree, (const float*))
FASTLM_DECLARE(void, prune_apply, (char*, int, int64_t, int64_t, const uint8_t*))
FASTLM_DECLARE(int64_t, prune_popcount, (const uint8_t*, int64_t))
FASTLM_DECLARE(void, prune_unpack, (const uint8_t*, int64_t, uint8_t*))
FASTLM_DECLARE(void, prune_pack, (const uint8_t*, int64_t, uint8_t*))
FASTLM_DECLARE(uint64_t, read_words, (const char*, int64_t))

namespace {
constexpr int64_t kPiece = prune_call::kPiece;
constexpr int32_t kInf = prune_call::kInf;
constexpr int64_t kParallelElements = 24 * 1024;  // below, a second thread costs more than it saves
constexpr int64_t kSampled = 1 << 17;             // below, the first range is everything
constexpr int64_t kSamples = 1 << 14;
constexpr int64_t kOwnRow = 1 << 16;  // rows up to this length are a thread's own

const float* fetch(const Row& row, int64_t begin, int64_t n, float* buffer) {
  FASTLM_DISPATCH(prune_fetch, row, begin, n, buffer);
}
void count(const float* x, int64_t n, int32_t low, int32_t last, int shift, Histogram* h) {
  FASTLM_DISPATCH(prune_count, x, n, low, last, shift, h);
}
void write(const float* x, int64_t n, Writer* w, uint8_t* out) { FASTLM_DISPATCH(prune_write, x, n, w, out); }
bool groups(const float* x, int64_t n, int keep, int m, uint8_t* out) {
  FASTLM_DISPATCH(prune_groups, x, n, keep, m, out);
}
bool transposable(const float* const* x, int64_t n, uint8_t* const* out) {
  FASTLM_DISPATCH(prune_transposable, x, n, out);
}
bool row_lanes(const float* x, int64_t n, float* lanes) { FASTLM_DISPATCH(prune_row_lanes, x, n, lanes); }
bool column_lanes(const float* x, int64_t n, float* sums) { FASTLM_DISPATCH(prune_column_lanes, x, n, sums); }
float tree(const float* lanes) { FASTLM_DISPATCH(prune_tree, lanes); }
void apply(char* x, int size, int64_t stride, int64_t n, const uint8_t* mask) {
  FASTLM_DISPATCH(prune_apply, x, size, stride, n, mask);
}
int64_t popcount(const uint8_t* mask, int64_t n) { FASTLM_DISPATCH(prune_popcount, mask, n); }
void unpack(const uint8_t* mask, int64_t n, uint8_t* out) { FASTLM_DISPATCH(prune_unpack, mask, n, out); }
void pack(const uint8_t* keep, int64_t n, uint8_t* out) { FASTLM_DISPATCH(prune_pack, keep, n, out); }
uint64_t words(const char* from, int64_t bytes) { FASTLM_DISPATCH(read_words, from, bytes); }

int64_t part(int64_t count, int thread, int threads) {
  return static_cast<int64_t>(static_cast<__int128>(count) * thread / threads);
}
template <class F>
void parallel(int threads, const F& body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) body(t);
}

// --- scores as rows ---

struct View {
  Sizes size;  // three leading axes, columns
  Tensor x;
  const float* scale;
  bool magnitude;
  uint8_t* mask;
  int64_t rows, columns, bytes, pieces;  // bytes of a mask's row; pieces of a row

  Row row(int64_t r) const {
    const int64_t i2 = r % size[2], i1 = r / size[2] % size[1], i0 = r / size[2] / size[1];
    const int64_t at = i0 * x[2] + i1 * x[3] + i2 * x[4];
    const int64_t width = x[1] == kFloat32 ? 4 : 2;
    return {reinterpret_cast<const char*>(x[0]) + at * width, static_cast<int>(x[1]), x[5], magnitude, scale};
  }
};

View view(const PruneScores& s) {
  View v;
  v.size = s.sizes;
  for (int64_t n : s.sizes) {
    if (n < 0) throw std::invalid_argument("prune_mask: sizes must not be negative");
  }
  v.rows = s.sizes[0] * s.sizes[1] * s.sizes[2];
  v.columns = s.sizes[3];
  if (v.rows * v.columns == 0) v.rows = v.columns = 0;
  v.x = s.score;
  if (v.rows && (s.score[0] == 0 || s.mask[0] == 0))
    throw std::invalid_argument("prune_mask: score or mask is missing");
  if (s.score[1] != kFloat32 && s.score[1] != kBFloat16 && s.score[1] != kFloat16) {
    throw std::invalid_argument("prune_mask: score must be float32, bfloat16 or float16");
  }
  if (s.mask[1] != kBool) throw std::invalid_argument("prune_mask: mask must be uint8");
  if (s.scale[0] != 0 && s.scale[1] != kFloat32) throw std::invalid_argument("prune_mask: scale must be float32");
  v.scale = reinterpret_cast<const float*>(s.scale[0]);
  v.magnitude = s.magnitude || v.scale != nullptr;
  v.mask = reinterpret_cast<uint8_t*>(s.mask[0]);
  v.bytes = (v.columns + 7) / 8;
  v.pieces = (v.columns + kPiece - 1) / kPiece;
  return v;
}

int threads_for(int64_t elements, int threads) { return elements < kParallelElements || threads < 1 ? 1 : threads; }

// Calls body(x, n, mask, row, column) for pieces [begin, end) of all views in order.
template <class F>
void pieces(const std::vector<View>& views, int64_t begin, int64_t end, const F& body) {
  float buffer[kPiece];
  int64_t first = 0;
  for (const View& v : views) {
    const int64_t all = v.rows * v.pieces;
    for (int64_t p = std::max(begin, first); p < std::min(end, first + all); ++p) {
      const int64_t r = (p - first) / v.pieces, at = (p - first) % v.pieces * kPiece;
      const int64_t n = std::min(kPiece, v.columns - at);
      body(fetch(v.row(r), at, n, buffer), n, v.mask + r * v.bytes + at / 8);
    }
    first += all;
  }
}

int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t magnitude = bits & 0x7FFFFFFF;
  return bits < 0 ? -magnitude : magnitude;
}

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// --- the k lowest ---

class Selection {
 public:
  Selection(const std::vector<View>& views, int64_t k, int threads) : views_(views), k_(k) {
    for (const View& v : views_) count_ += v.rows * v.columns, pieces_ += v.rows * v.pieces;
    threads_ = threads_for(count_, threads);
  }

  // Writes the masks; returns how many scores are NaN, and then no mask counts.
  int64_t run(std::vector<Histogram>& histograms) {
    if (count_ == 0) return 0;
    if (k_ == 0 || k_ == count_) {
      if (int64_t nan = tally(histograms, kInf, kInf, 0)) return nan;
      const bool all = k_ == 0;
      put(all ? -kInf - 1 : kInf, all ? -kInf - 1 : kInf, all ? 0 : count_, nullptr);
      return 0;
    }
    int32_t low = -kInf, last = kInf;
    if (count_ >= kSampled) sample(low, last);
    while (true) {
      const int64_t span = static_cast<int64_t>(last) - low;
      int shift = 0;
      while (span >> shift >= prune_call::kBins) ++shift;
      if (int64_t nan = tally(histograms, low, last, shift)) return nan;
      int64_t below = 0, inside = 0;
      for (int t = 0; t < threads_; ++t) below += histograms[t].below;
      int bin = 0;
      int64_t held = 0;
      for (; bin < prune_call::kBins; ++bin) {
        held = 0;
        for (int t = 0; t < threads_; ++t) held += histograms[t].bins[0][bin] + histograms[t].bins[1][bin];
        if (below < k_ && k_ <= below + inside + held) break;
        inside += held;
      }
      if (k_ <= below) {  // the sample missed
        last = low - 1, low = -kInf;
        continue;
      }
      if (bin == prune_call::kBins) {
        low = last + 1, last = kInf;
        continue;
      }
      const int64_t from = static_cast<int64_t>(low) + (static_cast<int64_t>(bin) << shift);
      last = static_cast<int32_t>(std::min<int64_t>(last, from + (int64_t{1} << shift) - 1));
      low = static_cast<int32_t>(from);
      if (low == last || held <= prune_call::kFew) {
        std::vector<int64_t> equal(threads_);
        for (int t = 0; t < threads_; ++t) equal[t] = histograms[t].bins[0][bin] + histograms[t].bins[1][bin];
        put(low, last, k_ - below - inside, equal.data());
        return 0;
      }
    }
  }

 private:
  int64_t tally(std::vector<Histogram>& histograms, int32_t low, int32_t last, int shift) {
    histograms.resize(std::max<size_t>(histograms.size(), threads_));
    parallel(threads_, [&](int t) {
      Histogram& h = histograms[t];
      std::memset(&h, 0, sizeof h);
      pieces(views_, part(pieces_, t, threads_), part(pieces_, t + 1, threads_),
             [&](const float* x, int64_t n, uint8_t*) { count(x, n, low, last, shift, &h); });
    });
    int64_t nan = 0;
    for (int t = 0; t < threads_; ++t) nan += histograms[t].nan;
    return nan;
  }

  // Of the keys in [low, last] the `gone` lowest go; `equal` says how many of them each thread will meet.
  void put(int32_t low, int32_t last, int64_t gone, const int64_t* equal) {
    std::vector<Writer> writers(threads_);
    std::vector<Candidate> candidates(low == last ? 0 : static_cast<size_t>(threads_) * prune_call::kFew);
    int64_t left = gone;
    for (int t = 0; t < threads_; ++t) {
      Candidate* own = candidates.empty() ? nullptr : candidates.data() + t * prune_call::kFew;
      writers[t] = {low, last, low == last, left, own, 0};
      left = equal ? std::max<int64_t>(left - equal[t], 0) : left;
    }
    parallel(threads_, [&](int t) {
      pieces(views_, part(pieces_, t, threads_), part(pieces_, t + 1, threads_),
             [&](const float* x, int64_t n, uint8_t* mask) { write(x, n, &writers[t], mask); });
    });
    if (low == last) return;
    std::vector<Candidate> all;
    for (const Writer& w : writers) all.insert(all.end(), w.candidates, w.candidates + w.found);
    std::stable_sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) { return a.key < b.key; });
    for (size_t i = static_cast<size_t>(gone); i < all.size(); ++i) *all[i].byte |= all[i].bit;
  }

  // A range of keys that holds the k-th lowest almost surely. One element of each stretch, at a mixed-up place, since
  // columns may differ in size.
  void sample(int32_t& low, int32_t& last) const {
    std::vector<int32_t> keys(kSamples);
    size_t at = 0;
    int64_t first = 0;
    for (int64_t i = 0; i < kSamples; ++i) {
      const int64_t begin = part(count_, i, kSamples), end = part(count_, i + 1, kSamples);
      int64_t place = begin + static_cast<int64_t>(mixed(i) % static_cast<uint64_t>(end - begin));
      while (place - first >= views_[at].rows * views_[at].columns) first += views_[at].rows * views_[at].columns, ++at;
      const View& v = views_[at];
      float x;
      keys[i] = key_of(*fetch(v.row((place - first) / v.columns), (place - first) % v.columns, 1, &x));
    }
    const double p = static_cast<double>(k_) / count_, margin = 4 * std::sqrt(kSamples * p * (1 - p)) + 4;
    const double down = std::floor(p * kSamples - margin), up = std::ceil(p * kSamples + margin);
    if (down >= 0) {
      std::nth_element(keys.begin(), keys.begin() + static_cast<int64_t>(down), keys.end());
      low = std::max(-kInf, keys[static_cast<size_t>(down)]);
    }
    if (up < kSamples) {
      std::nth_element(keys.begin(), keys.begin() + static_cast<int64_t>(up), keys.end());
      last = std::min(kInf, keys[static_cast<size_t>(up)]);
    }
    if (low > last || low > kInf || last < -kInf) low = -kInf, last = kInf;  // NaN among the samples
  }

  const std::vector<View>& views_;
  int64_t k_, count_ = 0, pieces_ = 0;
  int threads_ = 1;
};

View one_row(const View& v, int64_t r) {
  View out = v;
  const Row row = v.row(r);
  out.size = {1, 1, 1, v.columns};
  out.x[0] = reinterpret_cast<int64_t>(row.x);
  out.rows = 1;
  out.mask = v.mask + r * v.bytes;
  return out;
}

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

int64_t nan_of(const std::vector<View>& views) {
  int64_t nan = 0;
  for (const View& v : views) {
    for (int64_t r = 0; r < v.rows; ++r) {
      float buffer[kPiece];
      const Row row = v.row(r);
      for (int64_t at = 0; at < v.columns; at += kPiece) {
        const int64_t n = std::min(kPiece, v.columns - at);
        const float* x = fetch(row, at, n, buffer);
        for (int64_t i = 0; i < n; ++i) nan += x[i] != x[i];
      }
    }
  }
  return nan;
}

void fill(uint8_t* mask, int64_t columns, bool keep) {
  std::memset(mask, keep ? 0xFF : 0, static_cast<size_t>((columns + 7) / 8));
  if (keep && columns % 8) mask[columns / 8] = static_cast<uint8_t>((1 << (columns % 8)) - 1);
}
}  // namespace

int64_t prune_select_cpu(const std::vector<PruneScores>& scores, int64_t gone, int threads) {
  std::vector<View> views;
  int64_t all = 0;
  for (const PruneScores& s : scores) views.push_back(view(s)), all += views.back().rows * views.back().columns;
  if (gone < 0 || gone > all) throw std::invalid_argument("prune_mask: more are to go than there are");
  std::vector<Histogram> histograms;
  return Selection(views, gone, threads).run(histograms);
}

int64_t prune_rows_cpu(const PruneScores& scores, int64_t gone, int threads) {
  const View v = view(scores);
  if (gone < 0 || (v.columns > 0 && gone > v.columns)) {
    throw std::invalid_argument("prune_mask: more are to go than there are");
  }
  const bool own = v.columns <= kOwnRow;
  const int outer = own ? threads_for(v.rows * v.columns, threads) : 1;
  std::vector<int64_t> nan(outer, 0);
  parallel(outer, [&](int t) {
    std::vector<Histogram> histograms;
    std::vector<View> row(1);
    for (int64_t r = part(v.rows, t, outer); r < part(v.rows, t + 1, outer); ++r) {
      row[0] = one_row(v, r);
      nan[t] += Selection(row, gone, own ? 1 : threads).run(histograms);
    }
  });
  int64_t found = 0;
  for (int64_t n : nan) found += n;
  return found;
}

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

void apply_mask_cpu(Sizes sizes, Tensor weight, Tensor mask, int threads) {
  View v;
  v.size = sizes;
  v.x = weight;
  v.rows = sizes[0] * sizes[1] * sizes[2], v.columns = sizes[3];
  if (v.rows * v.columns == 0) return;
  if (weight[0] == 0 || mask[0] == 0) throw std::invalid_argument("apply_mask_: weight or mask is missing");
  if (weight[1] != kFloat32 && weight[1] != kBFloat16 && weight[1] != kFloat16) {
    throw std::invalid_argument("apply_mask_: weight must be float32, bfloat16 or float16");
  }
  v.scale = nullptr, v.magnitude = false;
  v.mask = reinterpret_cast<uint8_t*>(mask[0]);
  v.bytes = (v.columns + 7) / 8;
  const int64_t step = 8 * kPiece, cut = (v.columns + step - 1) / step, all = v.rows * cut;
  const int size = weight[1] == kFloat32 ? 4 : 2, used = threads_for(v.rows * v.columns, threads);
  parallel(used, [&](int t) {
    for (int64_t p = part(all, t, used); p < part(all, t + 1, used); ++p) {
      const int64_t r = p / cut, at = p % cut * step, n = std::min(step, v.columns - at);
      const Row row = v.row(r);
      apply(const_cast<char*>(row.x) + at * row.stride * size, size, row.stride, n, v.mask + r * v.bytes + at / 8);
    }
  });
}

int64_t mask_count_cpu(Tensor mask, int64_t bytes, int threads) {
  if (bytes == 0) return 0;
  if (mask[0] == 0 || mask[1] != kBool) throw std::invalid_argument("mask_count: mask must be uint8");
  const uint8_t* m = reinterpret_cast<const uint8_t*>(mask[0]);
  const int used = threads_for(bytes, threads);
  std::vector<int64_t> found(used);
  parallel(used, [&](int t) {
    const int64_t begin = part(bytes, t, used);
    found[t] = popcount(m + begin, part(bytes, t + 1, used) - begin);
  });
  int64_t sum = 0;
  for (int64_t n : found) sum += n;
  return sum;
}

void mask_bits_cpu(Tensor from, Tensor to, int64_t rows, int64_t columns, bool packing, int threads) {
  if (rows * columns == 0) return;
  if (from[0] == 0 || to[0] == 0 || from[1] != kBool || to[1] != kBool) {
    throw std::invalid_argument("mask: both must be uint8 or bool");
  }
  const uint8_t* x = reinterpret_cast<const uint8_t*>(from[0]);
  uint8_t* y = reinterpret_cast<uint8_t*>(to[0]);
  const int64_t bytes = (columns + 7) / 8;
  const int used = threads_for(rows * columns, threads);
  parallel(used, [&](int t) {
    for (int64_t r = part(rows, t, used); r < part(rows, t + 1, used); ++r) {
      if (packing) {
        pack(x + r * columns, columns, y + r * bytes);
      } else {
        unpack(x + r * bytes, columns, y + r * columns);
      }
    }
  });
}

void read_cpu(uintptr_t from, int64_t bytes, int threads) {
  if (bytes <= 0 || from == 0) return;
  const char* p = reinterpret_cast<const char*>(from);
  const int used = threads < 1 ? 1 : threads;
  std::vector<uint64_t> seen(used);
  parallel(used, [&](int t) {
    const int64_t begin = part(bytes, t, used) / 64 * 64,
                  end = t + 1 == used ? bytes : part(bytes, t + 1, used) / 64 * 64;
    seen[t] = words(p + begin, end - begin);
  });
  volatile uint64_t sink = 0;
  for (uint64_t s : seen) sink = sink | s;
}
}  // namespace fastlm
