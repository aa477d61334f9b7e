// Every processor: SSE2, NEON, or whatever else the compiler makes of vectors of 128 bits.
#define COT_LEVEL baseline
#define COT_VECTOR_BYTES 16
#include "level.h"
