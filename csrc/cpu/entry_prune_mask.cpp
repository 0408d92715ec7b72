// Pruning masks on the CPU: which single scores go. The loops over a piece of a row are in prune_mask.cpp; patterns are
// in entry_prune_mask_patterns.cpp.
//
// The k lowest of N scores, exactly, without sorting and with a few KiB: a sample gives a range of keys that holds the
// k-th almost surely; one pass counts what lies below and how the range's keys are spread over 2,048 bins; where the
// bin of the k-th holds a single key, or so few scores that they can be told apart one by one, a second pass writes the
// mask, else that bin is the next range. Two reads of the scores for most inputs, four at most but for a sample that
// missed. Ties go by their place: each thread knows from the first pass how many of them the threads before it hold.
#include <cmath>

#include "cpu/prune_mask_entry.h"

namespace fastlm {
using prune_call::Candidate;
using prune_call::Histogram;
using prune_call::Writer;
using namespace prune_entry;
FASTLM_DECLARE(void, prune_count, (const float*, int64_t, int32_t, int32_t, int, Histogram*))
FASTLM_DECLARE(void, prune_write, (const float*, int64_t, Writer*, uint8_t*))

namespace {
constexpr int32_t kInf = prune_call::kInf;
constexpr int64_t kSampled = 1 << 17;  // below, the first range is everything
constexpr int64_t kSamples = 1 << 14;
constexpr int64_t kOwnRow = 1 << 16;  // rows up to this length are a thread's own

void count(const float* x, int64_t n, int32_t low, int32_t last, int shift, Histogram* h) {
  FASTLM_DISPATCH(prune_count, x, n, low, last, shift, h);
}
void write(const float* x, int64_t n, Writer* w, uint8_t* out) { FASTLM_DISPATCH(prune_write, x, n, w, out); }

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

  // The two passes alone, for scores that lie on several processes: how the keys of [low, last] are spread.
  std::vector<int64_t> spread(int32_t low, int32_t last, int shift) {
    std::vector<Histogram> histograms;
    std::vector<int64_t> out(2 + prune_call::kBins);
    out[0] = tally(histograms, low, last, shift);
    for (int t = 0; t < threads_; ++t) {
      out[1] += histograms[t].below;
      for (int b = 0; b < prune_call::kBins; ++b) out[2 + b] += histograms[t].bins[0][b] + histograms[t].bins[1][b];
    }
    return out;
  }

  // And: keys below `key` go, and of those equal to it the first `ties`.
  void cut(int32_t key, int64_t ties) {
    std::vector<Histogram> histograms;
    tally(histograms, key, key, 0);
    std::vector<int64_t> equal(threads_);
    for (int t = 0; t < threads_; ++t) equal[t] = histograms[t].bins[0][0] + histograms[t].bins[1][0];
    put(key, key, ties, equal.data());
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

  const std::vector<View> views_;
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

std::vector<int64_t> prune_histogram_cpu(const PruneScores& scores, int32_t low, int32_t last, int shift, int threads) {
  if (low > last || shift < 0 || (static_cast<int64_t>(last) - low) >> shift >= prune_call::kBins) {
    throw std::invalid_argument("prune_mask: the range of keys does not fit into the bins");
  }
  return Selection({view(scores)}, 0, threads).spread(low, last, shift);
}

void prune_cut_cpu(const PruneScores& scores, int32_t key, int64_t ties, int threads) {
  if (ties < 0) throw std::invalid_argument("prune_mask: ties must not be negative");
  Selection({view(scores)}, 0, threads).cut(key, ties);
}
}  // namespace fastlm
