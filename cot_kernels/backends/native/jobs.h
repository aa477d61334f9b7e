// What is asked for: a loss of rows, their statistics, a gradient, or a loss and its gradient in place.
#pragma once

#include <cstdint>

namespace cot {

enum class Kind { COMPLEMENT_ENTROPY, GUIDED_COMPLEMENT_ENTROPY, CROSS_ENTROPY };

struct Objective {
  Kind kind;
  double scale;
  double eps;    // of complement entropy, plain and guided
  double power;  // alpha of the guided one; the weight of S beside cross-entropy
};

struct Strides {
  int64_t row, class_, column;  // in numbers
};

struct Rows {
  int64_t rows, classes, columns;  // (N, K, D): N D rows
  const void* logits;
  Strides at;
  const int64_t* target;
  int64_t target_row, target_column;
  int64_t ignore_index;
  bool along;  // a vector holds classes of one row
  int64_t block;  // rows of a block
  int64_t per_line, blocks;  // blocks of one n where vectors hold rows; blocks of all

  int64_t count() const { return rows * columns; }
  bool counts(int64_t target) const { return target != ignore_index && uint64_t(target) < uint64_t(classes); }
};

struct LossJob {
  Rows rows;
  Objective objective;
  void* state;   // [4, N D]: m, A, B, f_g
  void* losses;  // [N D], or null
  double* sums;  // of the losses of each block, or null
};

struct StatisticsJob {
  Rows rows;
  void* values;  // [3, N D]: z_g, L, S
  void* state;   // [3, N D]: m, s, t / s
};

struct GradientJob {
  Rows rows;
  const void* state;     // as of a loss
  const void* upstream;  // a number for each row, strides apart
  int64_t upstream_row, upstream_column;
  void* grad;
  Strides at;
};

struct InPlaceJob {  // (N, K) alone, whose rows are in one order however vectors lie
  Rows rows;
  Objective objective;
  const void* upstream;  // [N], or null for 1
  int64_t upstream_row;
  bool gradient;
  void* values;  // [3, N]: the loss, cross-entropy, S
};

enum Job { LOSS, STATISTICS, GRADIENT, IN_PLACE };
enum DType { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };

// Blocks of a job, from one to before another.
typedef void (*Work)(const void* job, int64_t begin, int64_t end);

// The arithmetic for one kind of processor.
struct Level {
  const char* name;
  int vector_bytes;
  Work work[4][4];  // by job and dtype
};

}  // namespace cot
