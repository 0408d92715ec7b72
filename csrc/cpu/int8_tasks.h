// How the threads of a call share its tasks: blocks of tiles.rows by tiles.columns, taken one after another. Each
// thread has tiles.scratch bytes of its own.
#pragma once
#include "cpu/attention_simd.h"
#include "cpu/int8_matmul.h"

namespace fastlm {
namespace FASTLM_ISA {

FASTLM_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// task(call, tiles, first row, first column, scratch) for every task of a call.
template <class Task>
FASTLM_INLINE void each_task(const int8_matmul_call::Call& call, const int8_matmul_call::Tiles& tiles, char* scratch,
                             Task task) {
  const int64_t across = (call.n + tiles.columns - 1) / tiles.columns;
  const int64_t count = (call.m + tiles.rows - 1) / tiles.rows * across;
#ifdef _OPENMP
  if (call.threads > 1) {
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      task(call, tiles, i / across * tiles.rows, i % across * tiles.columns, scratch + thread_number() * tiles.scratch);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    task(call, tiles, i / across * tiles.rows, i % across * tiles.columns, scratch);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
