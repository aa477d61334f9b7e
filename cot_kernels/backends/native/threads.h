// The blocks of a job over PyTorch's own OpenMP threads: another pool would fight with them for the processors.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>

#include "jobs.h"

namespace cot {

struct Shared {
  Work work;
  const void* job;
  int64_t blocks, grain;
  std::atomic<int64_t> next;
};

static void take_turns(void* data) {
  Shared& shared = *static_cast<Shared*>(data);
  for (;;) {
    const int64_t begin = shared.next.fetch_add(shared.grain, std::memory_order_relaxed);
    if (begin >= shared.blocks) return;
    const int64_t left = shared.blocks - begin;
    shared.work(shared.job, begin, begin + (left < shared.grain ? left : shared.grain));
  }
}

// Every block once, some `grain` of them at a time, on at most so many threads. The OpenMP runtime is the one that is
// loaded already, of GNU, LLVM or Intel; where none is, one thread does it all.
static void share(Work work, const void* job, int64_t blocks, int64_t grain, int threads) {
  typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
  static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (!parallel || threads < 2 || blocks <= grain) return work(job, 0, blocks);
  Shared shared{work, job, blocks, grain, {0}};
  parallel(take_turns, &shared, unsigned(threads), 0);
}

}  // namespace cot
