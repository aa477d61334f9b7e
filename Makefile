# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a test worker: with more, the workers' thread pools wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

KERNEL_TESTS := $(foreach name,extremes layouts losses poisoned statistics value_and_gradient,tests/test_$(name).py)

GPU_RESULTS := $(foreach part,bf16 fp32_fp16,benchmarks/results/gpu_$(part).json)

.PHONY: demo test study study-quick fuzz test-gpu test-emulated lint format compile-report bench-cpu bench-gpu bench-growth bench-startup \
  bench-dispatch bench-linear bench-training numerics readme clean

demo: $(VENV)/.installed  ## Fine-tune a transformer on BBC News with and without COT; table, PNG and JSON in demo-results/
	$(BIN)/python -m examples.demo --output demo-results

test: $(VENV)/.installed  ## The whole suite; kernels run in Triton's interpreter where there is no GPU
	$(PYTEST) -n 2 --dist worksteal

study: $(VENV)/.installed  ## Does it help? Fourteen ways to train on six tasks, hours; goes on where it was interrupted
	$(BIN)/python -m study --output study-results

study-quick: $(VENV)/.installed  ## The same on so little that it takes minutes and its figures mean nothing
	$(BIN)/python -m study --quick --output study-results/quick

fuzz: $(VENV)/.installed  ## New random cases, some 25,000: losses against the formula, and garbage in every argument
	$(PYTEST) -n 2 --dist worksteal --hypothesis-profile=fuzz tests/test_properties.py tests/test_garbage.py

test-gpu:  ## The GPU-marked tests, with whatever Python environment is active
	$(PYTHON) -m pytest -m gpu

test-emulated: $(VENV)/.installed  ## Those of the kernels as compiled for sm_90, executed on the CPU: some twenty minutes
	EMULATED_GPU=sm_90 $(PYTEST) -n 2 --dist worksteal -m gpu $(KERNEL_TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

compile-report: $(VENV)/.installed  ## Registers, spills, accesses and instructions of the kernels, and predictions, without a GPU
	$(BIN)/python -m benchmarks.compile_report --output benchmarks/results/compile_report.json
	$(BIN)/python -m benchmarks.widths --output benchmarks/results/widths.json --figure docs/performance/predicted.png

bench-cpu: $(VENV)/.installed  ## The benchmark suite on this CPU, what it says of the goals, and its pictures
	$(BIN)/python -m benchmarks --device cpu --output benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.goals benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.plots benchmarks/results/cpu.json --output docs/performance --prefix cpu_

bench-gpu:  ## The benchmark suite on this GPU, in two parts that start nothing after nine minutes, with whatever Python is active
	$(PYTHON) -m benchmarks --device cuda --dtype bf16 --output benchmarks/results/gpu_bf16.json
	$(PYTHON) -m benchmarks --device cuda --dtype fp32 --dtype fp16 --output benchmarks/results/gpu_fp32_fp16.json
	$(PYTHON) -m benchmarks.kernels --output benchmarks/results/gpu_kernels.json --figure docs/performance/gpu_kernels.png
	$(PYTHON) -m benchmarks.host --device cuda --output benchmarks/results/gpu_host.json
	$(PYTHON) -m benchmarks.linear --device cuda --output benchmarks/results/gpu_linear.json
	$(PYTHON) -m benchmarks.goals $(GPU_RESULTS)
	$(PYTHON) -m benchmarks.plots $(GPU_RESULTS) --output docs/performance --prefix gpu_

bench-growth: $(VENV)/.installed  ## How time and memory grow with rows and classes, on this CPU
	$(BIN)/python -m benchmarks.growth --output benchmarks/results/growth.json --figure docs/performance/growth.png

bench-startup: $(VENV)/.installed  ## What importing costs, and how many kernel variants class counts call for
	$(BIN)/python -m benchmarks.startup --output benchmarks/results/startup.json

bench-dispatch: $(VENV)/.installed  ## What the registered operators cost beside eager mode, on this CPU
	$(BIN)/python -m benchmarks.dispatch --output benchmarks/results/dispatch.json

bench-linear: $(VENV)/.installed  ## The fused linear losses beside three bare products, on this CPU
	$(BIN)/python -m benchmarks.linear --output benchmarks/results/linear.json

bench-training: $(VENV)/.installed  ## What the second step costs beside cross-entropy, on this CPU
	$(BIN)/python -m benchmarks.training --output benchmarks/results/training.json

numerics: $(VENV)/.installed  ## Gradient errors by logit margin and what eps does: JSON, and docs/numerics.png
	$(BIN)/python -m benchmarks.numerics --output benchmarks/results/numerics.json --figure docs/numerics.png

readme: $(VENV)/.installed  ## The tables of README and docs from the committed result files
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m study.page

# torch by itself first: its version decides which Triton and which build the rest must fit.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard cot_kernels/backends/native/*.cpp cot_kernels/backends/native/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) cot_kernels/backends/native/*.so demo-results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
