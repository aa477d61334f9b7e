// x86 processors with AVX2 and FMA.
#include "levels.h"

#if COT_X86_LEVELS
#pragma GCC target("arch=x86-64-v3")
#define COT_LEVEL avx2
#define COT_VECTOR_BYTES 32
#include "level.h"
#endif
