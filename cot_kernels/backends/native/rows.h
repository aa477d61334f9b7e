// Statistics and gradients of rows of logits, a block of at most a vector of rows at a time.
//
// Where the classes of a row fill vectors, a vector holds classes, and a row is read by itself; where they are few, or
// where rows adjoin (class-major logits), a vector holds rows. With d_j = z_j - m over the classes j != g:
//
//   m = max z_j    s = sum exp(d_j)    t = sum exp(d_j) d_j    S = t/s - ln s    b = (m - z_g) + ln s
//   dl/dz_j = exp(d_j) (A d_j + B),    A = f_S / s,    B = (f_L - f_S t/s) / s,    dl/dz_g = f_g
#pragma once

#include "objectives.h"

namespace cot::COT_LEVEL {

// A logit at or below it has probability zero.
constexpr double FLOOR = -1e30;

// Vectors of a running sum in float32, before it is added to the sum of sums: a single one of a hundred thousand
// classes would round off too much.
constexpr int TERMS = 64;

// Rows that are neighbours in what holds a number a row.
template <class S> struct Block {
  typedef ComputedIn<S> T;
  static constexpr int W = WIDTH<T>;

  int64_t first;
  int count;
  int64_t offset[W];  // of their first class, in the logits
  int64_t target[W];
  bool counted[W];

  COT_INLINE Block of(const Rows& rows, int64_t index) {
    Block block;
    int64_t n, d;
    if (rows.along) {
      block.first = index * rows.block;
      const int64_t left = rows.count() - block.first;
      block.count = int(left < rows.block ? left : rows.block);
      n = block.first / rows.columns, d = block.first % rows.columns;
    } else {
      n = index / rows.per_line, d = index % rows.per_line * W;
      block.first = n * rows.columns + d;
      block.count = int(rows.columns - d < W ? rows.columns - d : W);
    }
    for (int i = 0; i < W; ++i) {
      if (i >= block.count) {
        block.offset[i] = 0, block.target[i] = -1, block.counted[i] = false;
        continue;
      }
      block.offset[i] = n * rows.at.row + d * rows.at.column;
      block.target[i] = rows.target[n * rows.target_row + d * rows.target_column];
      block.counted[i] = rows.counts(block.target[i]);
      if (++d == rows.columns) d = 0, ++n;
    }
    return block;
  }

  COT_MEMBER Mask<T> mask() const {
    Mask<T> lanes;
    for (int i = 0; i < W; ++i) lanes[i] = counted[i] ? -1 : 0;
    return lanes;
  }
  COT_MEMBER Mask<T> targets() const {
    Mask<T> lanes;
    for (int i = 0; i < W; ++i) lanes[i] = typename Lanes<T>::Integer(target[i]);
    return lanes;
  }
};

template <class T> struct Sums {
  Vector<T> shift, total, moment;
};

template <class T> struct Coefficients {
  Vector<T> shift, slope, offset, at_target;  // m, A, B, f_g
};

template <class T> struct Finished {
  Vector<T> mean, negentropy, log_odds, lse;
  RowValues<T> values;
  Coefficients<T> coefficients;
};

COT_INLINE float number(float stored) { return stored; }
COT_INLINE double number(double stored) { return stored; }
template <class S> COT_INLINE float number(S stored) { return gather<S>(&stored, 1, 1, stored)[0]; }
// exp(d), and nothing at the target; d is kept within what exp takes.
template <class T> COT_INLINE Vector<T> weights(Vector<T>& d, Mask<T> left_out) {
  Mask<T> negligible = d < NEGLIGIBLE<T>;
  d = choose<T>(negligible, splat<T>(NEGLIGIBLE<T>), d);
  return choose<T>(left_out, Vector<T>{}, choose<T>(negligible, Vector<T>{}, exp_within<T>(d)));
}

template <class T>
COT_INLINE Vector<T> gradient_at(Vector<T> z, Mask<T> target, Vector<T> shift, Vector<T> slope, Vector<T> offset,
                                 Vector<T> at_target) {
  Vector<T> d = z - shift;
  Vector<T> weight = weights<T>(d, Mask<T>{});
  return choose<T>(target, at_target, weight * (slope * d + offset));
}

template <class T> COT_INLINE Vector<T> maximum(Vector<T> most, Vector<T> z, Mask<T> left_out) {
  return choose<T>(left_out, most, choose<T>(z > most, z, most));  // NaN passes by, and shows in the sums
}

// ---- a vector of classes of one row ----

template <class S, bool ADJOIN> struct Row {
  typedef ComputedIn<S> T;
  typedef typename Lanes<T>::Integer Integer;
  static constexpr int W = WIDTH<T>;

  S* classes;
  int64_t stride, count;
  int64_t whole;  // classes in whole vectors; where some are left the last W classes are a vector of their own
  int64_t last;
  Integer target;

  COT_INLINE Row of(S* classes, int64_t stride, int64_t count, int64_t target) {
    return {classes, stride, count, count / W * W, count - W, Integer(target)};
  }
  COT_MEMBER bool has_last() const { return whole < count; }
  // Of the last vector: what the whole ones have had already.
  COT_MEMBER Mask<T> had() const { return (iota<T>() + Integer(last)) < Integer(whole); }
  COT_MEMBER Mask<T> target_at(int64_t place) const { return iota<T>() == target - Integer(place); }

  COT_MEMBER Vector<T> read(int64_t place) const {
    return ADJOIN ? load(classes + place) : gather<S>(classes + place * stride, stride, W, S{});
  }
  COT_MEMBER void write(int64_t place, Vector<T> value) const {
    if (ADJOIN) store(classes + place, value);
    else scatter<S>(classes + place * stride, stride, W, value);
  }
};

template <class S, bool ADJOIN, class T = ComputedIn<S>>
COT_INLINE void sums_along(const Row<S, ADJOIN> row, T& shift, T& total, T& moment) {
  constexpr int W = WIDTH<T>;
  const Vector<T> last = row.has_last() ? row.read(row.last) : Vector<T>{};
  const Mask<T> last_left_out = row.had() | row.target_at(row.last);
  Vector<T> most = splat<T>(FLOOR);
  for (int64_t place = 0; place < row.whole; place += W)
    most = maximum<T>(most, row.read(place), row.target_at(place));
  if (row.has_last()) most = maximum<T>(most, last, last_left_out);
  shift = largest<T>(most);

  Vector<T> totals{}, moments{};
  for (int64_t start = 0; start < row.whole; start += TERMS * W) {
    Vector<T> s{}, t{};
    const int64_t end = row.whole - start < TERMS * W ? row.whole : start + TERMS * W;
    for (int64_t place = start; place < end; place += W) {
      Vector<T> d = row.read(place) - shift;
      const Vector<T> weight = weights<T>(d, row.target_at(place));
      s += weight;
      t += weight * d;
    }
    totals += s;
    moments += t;
  }
  if (row.has_last()) {
    Vector<T> d = last - shift;
    const Vector<T> weight = weights<T>(d, last_left_out);
    totals += weight;
    moments += weight * d;
  }
  total = sum<T>(totals);
  moment = sum<T>(moments);
}

// May write where it reads.
template <class S, bool ADJOIN, class T = ComputedIn<S>>
COT_INLINE void gradient_along(const Row<S, ADJOIN> row, const Row<S, ADJOIN> grad, T shift, T slope, T offset,
                               T at_target) {
  const Vector<T> m = splat<T>(shift), a = splat<T>(slope), b = splat<T>(offset), f = splat<T>(at_target);
  // Read before the whole vectors are written, which it overlaps; what both write is the same.
  const Vector<T> last = row.has_last() ? row.read(row.last) : Vector<T>{};
  for (int64_t place = 0; place < row.whole; place += WIDTH<T>)
    grad.write(place, gradient_at<T>(row.read(place), row.target_at(place), m, a, b, f));
  if (row.has_last()) grad.write(grad.last, gradient_at<T>(last, row.target_at(row.last), m, a, b, f));
}

template <class S, bool ADJOIN, class T = ComputedIn<S>> COT_INLINE void clear_along(const Row<S, ADJOIN> grad) {
  for (int64_t place = 0; place < grad.whole; place += WIDTH<T>) grad.write(place, Vector<T>{});
  if (grad.has_last()) grad.write(grad.last, Vector<T>{});
}

// ---- a vector of rows ----

template <class S> struct Column {
  typedef ComputedIn<S> T;
  S* first;  // the first row's first class
  int64_t stride, class_stride;
  int count;

  COT_MEMBER Vector<T> read(int64_t class_) const {
    const S* from = first + class_ * class_stride;
    return count == WIDTH<T> && stride == 1 ? load(from) : gather<S>(from, stride, count, S{});
  }
  COT_MEMBER void write(int64_t class_, Vector<T> value) const {
    S* to = first + class_ * class_stride;
    if (count == WIDTH<T> && stride == 1) store(to, value);
    else scatter<S>(to, stride, count, value);
  }
};

template <class S, class T = ComputedIn<S>>
COT_INLINE Sums<T> sums_across(const Column<S> column, int64_t classes, Mask<T> target) {
  typedef typename Lanes<T>::Integer Integer;
  Sums<T> sums = {splat<T>(FLOOR), Vector<T>{}, Vector<T>{}};
  for (int64_t place = 0; place < classes; ++place)
    sums.shift = maximum<T>(sums.shift, column.read(place), target == Integer(place));
  for (int64_t start = 0; start < classes; start += TERMS) {
    Vector<T> s{}, t{};
    const int64_t end = classes - start < TERMS ? classes : start + TERMS;
    for (int64_t place = start; place < end; ++place) {
      Vector<T> d = column.read(place) - sums.shift;
      const Vector<T> weight = weights<T>(d, target == Integer(place));
      s += weight;
      t += weight * d;
    }
    sums.total += s;
    sums.moment += t;
  }
  return sums;
}

template <class S, class T = ComputedIn<S>>
COT_INLINE void gradient_across(const Column<S> column, const Column<S> grad, int64_t classes, Mask<T> target,
                                Mask<T> counted, const Coefficients<T> c) {
  typedef typename Lanes<T>::Integer Integer;
  for (int64_t place = 0; place < classes; ++place) {
    const Vector<T> value =
        gradient_at<T>(column.read(place), target == Integer(place), c.shift, c.slope, c.offset, c.at_target);
    grad.write(place, choose<T>(counted, value, Vector<T>{}));
  }
}

// ---- blocks ----

template <class S> COT_INLINE S* logits_of(const Rows& rows) { return static_cast<S*>(const_cast<void*>(rows.logits)); }

template <class S> COT_INLINE Sums<ComputedIn<S>> sums_of(const Rows& rows, const Block<S>& block) {
  typedef ComputedIn<S> T;
  if (!rows.along) {
    const Column<S> column = {logits_of<S>(rows) + block.offset[0], rows.at.column, rows.at.class_, block.count};
    return sums_across<S>(column, rows.classes, block.targets());
  }
  Sums<T> sums = {Vector<T>{}, splat<T>(1), Vector<T>{}};
  for (int i = 0; i < block.count; ++i) {
    if (!block.counted[i]) continue;
    S* classes = logits_of<S>(rows) + block.offset[i];
    T shift, total, moment;
    if (rows.at.class_ == 1)
      sums_along(Row<S, true>::of(classes, 1, rows.classes, block.target[i]), shift, total, moment);
    else
      sums_along(Row<S, false>::of(classes, rows.at.class_, rows.classes, block.target[i]), shift, total, moment);
    sums.shift[i] = shift, sums.total[i] = total, sums.moment[i] = moment;
  }
  return sums;
}

template <class S> COT_INLINE Vector<ComputedIn<S>> target_logits(const Rows& rows, const Block<S>& block) {
  Vector<ComputedIn<S>> values{};
  for (int i = 0; i < block.count; ++i)
    if (block.counted[i]) values[i] = number(logits_of<S>(rows)[block.offset[i] + block.target[i] * rows.at.class_]);
  return values;
}

template <class T> COT_INLINE void finish_rows(const Objective& objective, Sums<T>& sums, Vector<T> target_logit, Finished<T>& to) {
  // No class above the floor: b = -inf within rounding. (In a row of NaN none is either, but its sums are NaN.)
  const Mask<T> empty = (sums.shift <= T(FLOOR)) & (sums.total == sums.total);
  sums.total = choose<T>(empty, splat<T>(1), sums.total);
  const Vector<T> log_total = log<T>(sums.total);
  to.mean = choose<T>(empty, Vector<T>{}, sums.moment / sums.total);
  to.negentropy = to.mean - log_total;
  to.log_odds = (sums.shift - target_logit) + log_total;
  to.lse = choose<T>(empty, splat<T>(-std::numeric_limits<T>::infinity()), sums.shift + log_total);
  to.values = evaluate<T>(objective, to.log_odds, to.negentropy);
  // A class of an empty complement has a weight of 0, whatever its logit.
  sums.total = choose<T>(empty, splat<T>(std::numeric_limits<T>::infinity()), sums.total);
  const Vector<T> slope = to.values.d_negentropy / sums.total;
  to.coefficients = {sums.shift, slope, to.values.d_log_odds / sums.total - slope * to.mean, -to.values.d_log_odds};
}

template <class S>
COT_INLINE void write_gradient(const Rows& rows, const Block<S>& block, const Coefficients<ComputedIn<S>>& c, S* grad,
                               Strides at) {
  if (!rows.along) {
    const int64_t offset = block.first / rows.columns * at.row + block.first % rows.columns * at.column;
    const Column<S> from = {logits_of<S>(rows) + block.offset[0], rows.at.column, rows.at.class_, block.count};
    const Column<S> to = {grad + offset, at.column, at.class_, block.count};
    return gradient_across<S>(from, to, rows.classes, block.targets(), block.mask(), c);
  }
  for (int i = 0; i < block.count; ++i) {
    const int64_t row = block.first + i, k = rows.classes, g = block.target[i];
    S* from = logits_of<S>(rows) + block.offset[i];
    S* to = grad + row / rows.columns * at.row + row % rows.columns * at.column;
    if (rows.at.class_ == 1 && at.class_ == 1) {
      const auto of = Row<S, true>::of(to, 1, k, g);
      if (!block.counted[i]) clear_along(of);
      else gradient_along(Row<S, true>::of(from, 1, k, g), of, c.shift[i], c.slope[i], c.offset[i], c.at_target[i]);
    } else {
      const auto of = Row<S, false>::of(to, at.class_, k, g);
      const auto row_of = Row<S, false>::of(from, rows.at.class_, k, g);
      if (!block.counted[i]) clear_along(of);
      else gradient_along(row_of, of, c.shift[i], c.slope[i], c.offset[i], c.at_target[i]);
    }
  }
}

}  // namespace cot::COT_LEVEL
