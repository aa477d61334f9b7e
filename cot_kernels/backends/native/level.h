// A level: the jobs, compiled for one kind of processor. It is included by one source for each, which defines
// COT_LEVEL, its namespace, and COT_VECTOR_BYTES, and says what the compiler may use.
#pragma once

#include "rows.h"

namespace cot::COT_LEVEL {

// Each is compiled once for all jobs.
#define COT_SHARED __attribute__((noinline))

template <class S> COT_SHARED void sums(const Rows& rows, const Block<S>& block, Sums<ComputedIn<S>>& to) {
  to = sums_of<S>(rows, block);
}
template <class S>
COT_SHARED void gradient(const Rows& rows, const Block<S>& block, const Coefficients<ComputedIn<S>>& c, S* grad,
                         const Strides& at) {
  write_gradient<S>(rows, block, c, grad, at);
}
template <class T>
COT_SHARED void finish(const Objective& objective, Sums<T>& sums, const Vector<T>& target_logit, Finished<T>& to) {
  finish_rows<T>(objective, sums, target_logit, to);
}

// Numbers of the block's rows to and from what holds one a row, place by place. Those of rows left out are 0.
template <class S> void put(void* array, int64_t place, const Rows& rows, const Block<S>& block,
                            const Vector<ComputedIn<S>>& values) {
  ComputedIn<S>* to = static_cast<ComputedIn<S>*>(array) + place * rows.count() + block.first;
  for (int i = 0; i < block.count; ++i) to[i] = block.counted[i] ? values[i] : 0;
}
template <class S> void take(const void* array, int64_t place, const Rows& rows, const Block<S>& block,
                             Vector<ComputedIn<S>>& values) {
  const ComputedIn<S>* from = static_cast<const ComputedIn<S>*>(array) + place * rows.count() + block.first;
  for (int i = 0; i < block.count; ++i) values[i] = from[i];
}

template <class T> void scale(Coefficients<T>& c, int lane, T factor) {
  c.slope[lane] *= factor, c.offset[lane] *= factor, c.at_target[lane] *= factor;
}

template <class S> void forward(const Rows& rows, const Objective& objective, const Block<S>& block,
                                Vector<ComputedIn<S>>& target_logit, Sums<ComputedIn<S>>& found,
                                Finished<ComputedIn<S>>& finished) {
  target_logit = target_logits<S>(rows, block);
  sums<S>(rows, block, found);
  finish<ComputedIn<S>>(objective, found, target_logit, finished);
}

template <class S> void run(const LossJob& job, int64_t index) {
  typedef ComputedIn<S> T;
  const Block<S> block = Block<S>::of(job.rows, index);
  Vector<T> target_logit;
  Sums<T> found;
  Finished<T> finished;
  forward<S>(job.rows, job.objective, block, target_logit, found, finished);
  put(job.state, 0, job.rows, block, finished.coefficients.shift);
  put(job.state, 1, job.rows, block, finished.coefficients.slope);
  put(job.state, 2, job.rows, block, finished.coefficients.offset);
  put(job.state, 3, job.rows, block, finished.coefficients.at_target);
  if (job.losses) put(job.losses, 0, job.rows, block, finished.values.loss);
  if (!job.sums) return;
  double sum = 0;
  for (int i = 0; i < block.count; ++i) sum += block.counted[i] ? finished.values.loss[i] : 0;
  job.sums[index] = sum;
}

template <class S> void run(const StatisticsJob& job, int64_t index) {
  typedef ComputedIn<S> T;
  const Block<S> block = Block<S>::of(job.rows, index);
  Vector<T> target_logit;
  Sums<T> found;
  Finished<T> finished;
  forward<S>(job.rows, {Kind::CROSS_ENTROPY, 1, 0, 0}, block, target_logit, found, finished);
  put(job.values, 0, job.rows, block, target_logit);
  put(job.values, 1, job.rows, block, finished.lse);
  put(job.values, 2, job.rows, block, finished.negentropy);
  put(job.state, 0, job.rows, block, found.shift);
  put(job.state, 1, job.rows, block, found.total);
  put(job.state, 2, job.rows, block, finished.mean);
}

template <class S> void run(const GradientJob& job, int64_t index) {
  typedef ComputedIn<S> T;
  const Block<S> block = Block<S>::of(job.rows, index);
  Coefficients<T> c{};
  take(job.state, 0, job.rows, block, c.shift);
  take(job.state, 1, job.rows, block, c.slope);
  take(job.state, 2, job.rows, block, c.offset);
  take(job.state, 3, job.rows, block, c.at_target);
  int64_t n = block.first / job.rows.columns, d = block.first % job.rows.columns;
  for (int i = 0; i < block.count; ++i) {
    scale(c, i, static_cast<const T*>(job.upstream)[n * job.upstream_row + d * job.upstream_column]);
    if (++d == job.rows.columns) d = 0, ++n;
  }
  gradient<S>(job.rows, block, c, static_cast<S*>(job.grad), job.at);
}

template <class S> void run(const InPlaceJob& job, int64_t index) {
  typedef ComputedIn<S> T;
  const Block<S> block = Block<S>::of(job.rows, index);
  Vector<T> target_logit, parts;
  Sums<T> found;
  Finished<T> finished;
  forward<S>(job.rows, job.objective, block, target_logit, found, finished);
  parts = softplus<T>(finished.log_odds);
  put(job.values, 0, job.rows, block, finished.values.loss);
  put(job.values, 1, job.rows, block, parts);
  put(job.values, 2, job.rows, block, finished.negentropy);
  if (!job.gradient) return;
  for (int i = 0; job.upstream && i < block.count; ++i)
    scale(finished.coefficients, i, static_cast<const T*>(job.upstream)[(block.first + i) * job.upstream_row]);
  gradient<S>(job.rows, block, finished.coefficients, logits_of<S>(job.rows), job.rows.at);
}

template <class Kind, class S> void work_on(const void* job, int64_t begin, int64_t end) {
  for (; begin < end; ++begin) run<S>(*static_cast<const Kind*>(job), begin);
}

#define COT_QUOTED(NAME) #NAME
#define COT_NAME_OF(LEVEL) COT_QUOTED(LEVEL)
#define COT_WORK(KIND) {work_on<KIND, float>, work_on<KIND, double>, work_on<KIND, Half>, work_on<KIND, BFloat16>}
extern const Level LEVEL;
const Level LEVEL = {
    COT_NAME_OF(COT_LEVEL), VECTOR_BYTES,
    {COT_WORK(LossJob), COT_WORK(StatisticsJob), COT_WORK(GradientJob), COT_WORK(InPlaceJob)},
};

}  // namespace cot::COT_LEVEL
