# Every command of the project; README's two need none of this.
PYTHON ?= python
THREADS ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)))")
export OMP_NUM_THREADS ?= $(THREADS)
CXX_FILES = csrc/*.* csrc/*/* $(filter-out %.py,$(wildcard tests/cuda_host/*.*))

.PHONY: install check format test test-slow test-support aot bench bench-slow bench-sweep bench-save bench-compare memory docs demo wheel gpu-report clean

install:  ## editable, with everything the tests need
	$(PYTHON) -m pip install -c constraints.txt -e ".[dev]"

check:  ## lint and formatting, Python and C++
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $(CXX_FILES)

test:
	$(PYTHON) -m pytest

test-slow:  ## builds without nvcc and without a compiler, wheels, a second install, LoRA on reports
	$(PYTHON) -m pytest -m slow

test-support:  ## build and self-test under every Python that is found; adds to docs/support.json
	$(PYTHON) tests/check_support.py --save

aot:  ## every Triton kernel with every tuned config and every CUDA kernel, for every card
	$(PYTHON) -m pytest -m aot

bench:
	$(PYTHON) -m pytest benchmarks/ --benchmark-only

bench-slow:  ## the cases of a minute and more and the sizes between; adds to the day's result file
	$(PYTHON) -m pytest benchmarks/ --benchmark-only -m slow --save-result

bench-sweep:  ## the sizes between, for the plots; adds to the day's result file
	$(PYTHON) -m pytest benchmarks/bench_attention.py benchmarks/bench_decode_attention.py --benchmark-only -m slow --save-result

bench-save:  ## as bench, and write benchmarks/results/
	$(PYTHON) -m pytest benchmarks/ --benchmark-only --save-result

bench-compare:  ## OLD=... NEW=...: fails where one of ours lost against the run's own baseline
	$(PYTHON) benchmarks/compare.py $(OLD) $(NEW)

memory:  ## peak memory of attention over sizes, into benchmarks/results; of experts and patch_embed
	$(PYTHON) benchmarks/memory_sweep.py --save-result
	$(PYTHON) benchmarks/memory_experts.py
	$(PYTHON) benchmarks/memory_patch_embed.py

docs:  ## docs/performance.md, docs/support.md and README's figures, from result files
	$(PYTHON) benchmarks/performance.py
	$(PYTHON) docs/make_support.py

demo:  ## the three stages on real pictures and reports with the tiny model, a few minutes
	$(PYTHON) examples/demo_curriculum.py build/demo

wheel:  ## a wheel for every card, tested as installed, not editable
	rm -rf dist
	MEDGPT_CUDA_ARCHS=all MEDGPT_REQUIRE_NATIVE=1 $(PYTHON) -m pip wheel --no-deps -w dist .
	$(PYTHON) tests/check_wheel.py dist/*.whl

gpu-report:  ## on a machine with a GPU: builds, tests, measures all; docs/gpu_report.md. PARTS="roofs attention"
	$(PYTHON) benchmarks/gpu_report.py $(PARTS)

clean:
	rm -rf build dist *.egg-info medgpt_kernels/*.so medgpt_kernels/_build_info.txt
