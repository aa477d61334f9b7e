// Which levels there are.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "jobs.h"

// Clang has no such pragma for a whole file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define COT_X86_LEVELS 1
#else
#define COT_X86_LEVELS 0
#endif

namespace cot {

namespace baseline { extern const Level LEVEL; }
#if COT_X86_LEVELS
namespace avx2 { extern const Level LEVEL; }
namespace avx512 { extern const Level LEVEL; }
#endif

// Those that this processor runs, the best one last.
inline std::vector<const Level*> levels_of_processor() {
  std::vector<const Level*> levels{&baseline::LEVEL};
#if COT_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) levels.push_back(&avx2::LEVEL);
  if (__builtin_cpu_supports("x86-64-v4")) levels.push_back(&avx512::LEVEL);
#endif
  return levels;
}

}  // namespace cot
