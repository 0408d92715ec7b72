// What is done with pruning masks: applied, counted, packed and unpacked; and what reading alone costs, for benchmarks.
#include "cpu/prune_mask_entry.h"

namespace fastlm {
using namespace prune_entry;
FASTLM_DECLARE(void, prune_apply, (char*, int, int64_t, int64_t, const uint8_t*))
FASTLM_DECLARE(int64_t, prune_popcount, (const uint8_t*, int64_t))
FASTLM_DECLARE(void, prune_unpack, (const uint8_t*, int64_t, uint8_t*))
FASTLM_DECLARE(void, prune_pack, (const uint8_t*, int64_t, uint8_t*))
FASTLM_DECLARE(uint64_t, read_words, (const char*, int64_t))

namespace {
void apply(char* x, int size, int64_t stride, int64_t n, const uint8_t* mask) {
  FASTLM_DISPATCH(prune_apply, x, size, stride, n, mask);
}
int64_t popcount(const uint8_t* mask, int64_t n) { FASTLM_DISPATCH(prune_popcount, mask, n); }
void unpack(const uint8_t* mask, int64_t n, uint8_t* out) { FASTLM_DISPATCH(prune_unpack, mask, n, out); }
void pack(const uint8_t* keep, int64_t n, uint8_t* out) { FASTLM_DISPATCH(prune_pack, keep, n, out); }
uint64_t words(const char* from, int64_t bytes) { FASTLM_DISPATCH(read_words, from, bytes); }
}  // namespace

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
