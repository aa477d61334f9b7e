// Which levels there are, and which one this processor takes.
#pragma once

#include <cstring>
#include <limits>

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

inline const Level& level_of_processor() {
#if COT_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return avx512::LEVEL;
  if (__builtin_cpu_supports("x86-64-v3")) return avx2::LEVEL;
#endif
  return baseline::LEVEL;
}

}  // namespace cot
