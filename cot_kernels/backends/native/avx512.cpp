// x86 processors with AVX-512.
#include "levels.h"

#if COT_X86_LEVELS
#pragma GCC target("arch=x86-64-v4")
#define COT_LEVEL avx512
#define COT_VECTOR_BYTES 64
#include "level.h"
#endif
