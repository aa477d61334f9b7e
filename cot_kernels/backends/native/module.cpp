// The Python module: addresses, shapes and strides in, rows of numbers out. Its only caller is backend.py, which says
// what is at the addresses; here it is only asked whether there is anything. See _rows.pyi for the arguments.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <vector>

#include "levels.h"
#include "threads.h"

namespace {

// Logits of at least so many numbers are worth a second thread.
constexpr int64_t SHARED_NUMBERS = 1 << 13;

const std::vector<const cot::Level*> LEVELS = cot::levels_of_processor();
const cot::Level* level = LEVELS.back();

// Arguments in turn. What does not fit leaves an exception and gives 0.
struct Arguments {
  PyObject* const* next;
  PyObject* const* end;

  PyObject* take() {
    if (next != end) return *next++;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "too few arguments");
    return nullptr;
  }
  int64_t integer() {
    PyObject* value = take();
    return value && !PyErr_Occurred() ? PyLong_AsLongLong(value) : 0;
  }
  double real() {
    PyObject* value = take();
    return value && !PyErr_Occurred() ? PyFloat_AsDouble(value) : 0;
  }
  void* address() {
    PyObject* value = take();
    return value && !PyErr_Occurred() ? PyLong_AsVoidPtr(value) : nullptr;
  }
  // Of something to read or write, where there are numbers at all.
  void* memory(bool needed) {
    void* found = address();
    if (needed && !found && !PyErr_Occurred())
      PyErr_SetString(PyExc_RuntimeError, "a tensor has no memory to read from or to write to");
    return found;
  }
  // A tuple, filled up.
  template <size_t most> std::array<int64_t, most> integers(int64_t filler = 0) {
    std::array<int64_t, most> values;
    values.fill(filler);
    PyObject* tuple = take();
    if (!tuple || PyErr_Occurred()) return values;
    const Py_ssize_t count = PyTuple_Check(tuple) ? PyTuple_Size(tuple) : -1;
    if (count < 0 || count > Py_ssize_t(most))
      PyErr_Format(PyExc_TypeError, "a tuple of at most %zu numbers is wanted", most);
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); ++i) values[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
    return values;
  }
  bool complete() {
    if (next != end && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "too many arguments");
    return !PyErr_Occurred();
  }
};

struct Call {
  int dtype, threads;
  cot::Rows rows;
  bool over_columns;  // rows of (N, K) logits that vectors cannot lie along are taken as the columns of one n
};

cot::Strides strides(Arguments& arguments) {
  const auto [row, class_, column] = arguments.integers<3>();
  return {row, class_, column};
}

void turn(cot::Strides& at) { at.column = at.row, at.row = 0; }

// dtype, threads, shape, address and strides of the logits; address and strides of the target; ignore_index.
Call call_of(Arguments& arguments) {
  Call call;
  cot::Rows& rows = call.rows;
  call.dtype = int(arguments.integer()) & 3;
  call.threads = int(arguments.integer());
  const auto shape = arguments.integers<3>(1);
  rows.rows = shape[0], rows.classes = shape[1], rows.columns = shape[2];
  rows.logits = arguments.memory(rows.count() && rows.classes);
  rows.at = strides(arguments);
  rows.target = static_cast<const int64_t*>(arguments.memory(rows.count()));
  const auto of_target = arguments.integers<2>();
  rows.target_row = of_target[0], rows.target_column = of_target[1];
  rows.ignore_index = arguments.integer();
  const int64_t width = level->vector_bytes / (call.dtype == cot::FLOAT64 ? 8 : 4);
  const bool fill = rows.classes >= width;  // the classes of a row fill a vector
  call.over_columns = rows.columns == 1 && !(fill && rows.at.class_ == 1);
  if (call.over_columns) {
    turn(rows.at);
    rows.target_column = rows.target_row, rows.target_row = 0;
    rows.columns = rows.rows, rows.rows = 1;
  }
  rows.along = fill && (rows.at.class_ == 1 || rows.at.column != 1);
  if (rows.along) {
    // Few rows are shared out in small blocks.
    const int64_t share = rows.count() / (4 * (call.threads > 0 ? call.threads : 1));
    rows.block = share < 1 ? 1 : share < width ? share : width;
    rows.per_line = 0;
    rows.blocks = (rows.count() + rows.block - 1) / rows.block;
  } else {
    rows.block = width;
    rows.per_line = (rows.columns + width - 1) / width;
    rows.blocks = rows.rows * rows.per_line;
  }
  return call;
}

cot::Objective objective_of(Arguments& arguments) {
  cot::Objective objective;
  objective.kind = static_cast<cot::Kind>(arguments.integer());
  objective.scale = arguments.real(), objective.eps = arguments.real(), objective.power = arguments.real();
  return objective;
}

void work(cot::Job kind, const Call& call, const void* job) {
  const cot::Rows& rows = call.rows;
  if (!rows.blocks) return;
  const int64_t numbers = rows.count() * rows.classes, of_block = numbers / rows.blocks;
  // A few turns a thread: threads that write side by side wait for each other where memory is touched for the first time.
  const int64_t turns = 4 * (call.threads > 0 ? call.threads : 1);
  const int64_t least = 1 + SHARED_NUMBERS / 4 / (of_block > 0 ? of_block : 1);
  const int64_t grain = rows.blocks / turns > least ? rows.blocks / turns : least;
  cot::share(level->work[kind][call.dtype], job, rows.blocks, grain, numbers < SHARED_NUMBERS ? 1 : call.threads);
}

struct Targets {
  int64_t counted = 0;
  bool wrong = false;
  int64_t value = 0;  // one that is neither a class nor ignored
};

Targets look(const cot::Rows& rows) {
  Targets found;
  const uint64_t classes = uint64_t(rows.classes);
  for (int64_t n = 0; n < rows.rows; ++n) {
    const int64_t* target = rows.target + n * rows.target_row;
    const int64_t step = rows.target_column;
    int64_t ignored = 0, wrong = 0;
    for (int64_t d = 0; d < rows.columns; ++d) {
      const bool out = target[d * step] == rows.ignore_index;
      ignored += out;
      wrong += !out & (uint64_t(target[d * step]) >= classes);
    }
    found.counted += rows.columns - ignored;
    for (int64_t d = 0; wrong && !found.wrong && d < rows.columns; ++d) {
      found.value = target[d * step];
      found.wrong = found.value != rows.ignore_index && uint64_t(found.value) >= classes;
    }
  }
  return found;
}

PyObject* refuse(const Call& call, int64_t target) {
  return PyErr_Format(PyExc_IndexError,
                      "target %lld is out of bounds for %lld classes: expected 0 <= target < %lld, or ignore_index=%lld",
                      static_cast<long long>(target), static_cast<long long>(call.rows.classes),
                      static_cast<long long>(call.rows.classes), static_cast<long long>(call.rows.ignore_index));
}

// The job, if each target is a class or ignored.
PyObject* checked(cot::Job kind, const Call& call, const void* job) {
  Targets targets;
  Py_BEGIN_ALLOW_THREADS;
  targets = look(call.rows);
  if (!targets.wrong) work(kind, call, job);
  Py_END_ALLOW_THREADS;
  if (targets.wrong) return refuse(call, targets.value);
  Py_RETURN_NONE;
}

template <class T> void put_total(void* to, double value) { *static_cast<T*>(to) = T(value); }

PyObject* loss(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments{given, given + count};
  const Call call = call_of(arguments);
  cot::LossJob job{call.rows, objective_of(arguments), nullptr, nullptr, nullptr};
  const bool mean = arguments.integer();
  job.state = arguments.memory(call.rows.count()), job.losses = arguments.address();
  void* total = arguments.address();
  if (!arguments.complete()) return nullptr;
  Targets targets;
  Py_BEGIN_ALLOW_THREADS;
  targets = look(call.rows);
  if (!targets.wrong) {
    if (mean && targets.counted) job.objective.scale /= double(targets.counted);
    std::vector<double> sums(total ? size_t(call.rows.blocks) : 0);
    job.sums = total ? sums.data() : nullptr;
    work(cot::LOSS, call, &job);
    if (total) {
      double value = mean && !targets.counted ? std::numeric_limits<double>::quiet_NaN() : 0;
      for (double sum : sums) value += sum;
      call.dtype == cot::FLOAT64 ? put_total<double>(total, value) : put_total<float>(total, value);
    }
  }
  Py_END_ALLOW_THREADS;
  if (targets.wrong) return refuse(call, targets.value);
  Py_RETURN_NONE;
}

PyObject* statistics(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments{given, given + count};
  const Call call = call_of(arguments);
  cot::StatisticsJob job{call.rows, nullptr, nullptr};
  job.values = arguments.memory(call.rows.count()), job.state = arguments.memory(call.rows.count());
  if (!arguments.complete()) return nullptr;
  return checked(cot::STATISTICS, call, &job);
}

PyObject* gradient(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments{given, given + count};
  const Call call = call_of(arguments);
  cot::GradientJob job{call.rows, nullptr, nullptr, 0, 0, nullptr, {0, 0, 0}};
  job.state = arguments.memory(call.rows.count()), job.upstream = arguments.memory(call.rows.count());
  const auto of_upstream = arguments.integers<2>();
  job.upstream_row = of_upstream[0], job.upstream_column = of_upstream[1];
  job.grad = arguments.memory(call.rows.count() && call.rows.classes);
  job.at = strides(arguments);
  if (!arguments.complete()) return nullptr;
  if (call.over_columns) {
    turn(job.at);
    job.upstream_column = job.upstream_row, job.upstream_row = 0;
  }
  Py_BEGIN_ALLOW_THREADS;
  work(cot::GRADIENT, call, &job);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject* value_and_gradient(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments{given, given + count};
  const Call call = call_of(arguments);
  cot::InPlaceJob job{call.rows, objective_of(arguments), nullptr, 0, false, nullptr};
  job.upstream = arguments.address(), job.upstream_row = arguments.integer();
  job.gradient = arguments.integer();
  job.values = arguments.memory(call.rows.count());
  if (!arguments.complete()) return nullptr;
  return checked(cot::IN_PLACE, call, &job);
}

PyObject* levels(PyObject*, PyObject*) {
  PyObject* names = PyTuple_New(Py_ssize_t(LEVELS.size()));
  for (size_t i = 0; names && i < LEVELS.size(); ++i)
    PyTuple_SetItem(names, Py_ssize_t(i), PyUnicode_FromString(LEVELS[i]->name));
  return names;
}

PyObject* use(PyObject*, PyObject* number) {
  const size_t index = PyLong_AsSize_t(number);
  if (PyErr_Occurred()) return nullptr;
  if (index >= LEVELS.size()) return PyErr_Format(PyExc_ValueError, "this processor has %zu levels", LEVELS.size());
  level = LEVELS[index];
  Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {
    {"loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(loss)), METH_FASTCALL, nullptr},
    {"statistics", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(statistics)), METH_FASTCALL, nullptr},
    {"gradient", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(gradient)), METH_FASTCALL, nullptr},
    {"value_and_gradient", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(value_and_gradient)), METH_FASTCALL,
     nullptr},
    {"levels", levels, METH_NOARGS, nullptr},
    {"use", use, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot SLOTS[] = {{0, nullptr}};
PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_rows", nullptr, 0, METHODS, SLOTS, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__rows() { return PyModuleDef_Init(&MODULE); }
