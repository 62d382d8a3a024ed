# Each target is enough on its own: without an active virtual environment it makes .venv first.
ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
BASE_PYTHON ?= python3
PYTHON := $(VENV)/bin/python
# One thread a process: the tests run two processes side by side.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2
INSTALLED := $(VENV)/.linvideo-installed
# What test-fast runs: the rules of the layout and the wording, the op, layers, models, configs and the method's parts.
FAST := tests/test_structure.py tests/test_wording.py tests/ops/test_grid.py tests/ops/test_reference.py \
	tests/ops/test_linear_attn_errors.py tests/nn tests/models/test_convert.py tests/transfer/test_selection.py
FAST_KERNELS := tests/kernels/test_edges.py

.PHONY: help install demo test test-fast test-all test-gpu attack evidence gates bench lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(INSTALLED): setup.py constraints.txt
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "linvideo needs Python >= 3.11, this is " + sys.version)'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test,bench]"
	touch $@

install: $(INSTALLED)  ## make .venv (or use the active environment) and install everything with tested versions

demo: $(INSTALLED)  ## convert the embedded model and write videos and report.html into runs/demo-<time>
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(PYTHON) -m linvideo demo --output_dir runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(INSTALLED)  ## run the test suite (kernels in Triton's interpreter, ahead-of-time compiles, the rest)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels -m "not full"
	$(PYTEST) tests/aot -m "not full"
	$(PYTEST) tests --ignore tests/kernels --ignore tests/aot -m "not full"

test-fast: $(INSTALLED)  ## run the quickest tests, in under two minutes on two cores
	$(PYTEST) -m "not full" $(FAST)
	TRITON_INTERPRET=1 $(PYTEST) -m "not full" $(FAST_KERNELS)

test-all: $(INSTALLED)  ## the same with many more cases, and with torchao (about an hour)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[8bit]"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels
	$(PYTEST) tests/aot
	$(PYTEST) tests --ignore tests/kernels --ignore tests/aot

# The workers take the tests of a file one by one, the largest first: compiling is most of it.
test-gpu: $(INSTALLED)  ## run the kernels' tests on this machine's GPU (a few minutes; memory for 8 processes)
	$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "test-gpu needs a CUDA GPU")'
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 8 --maxschedchunk 1 -m "not full" \
		tests/kernels/test_many_tiles.py $(filter-out %/test_many_tiles.py,$(wildcard tests/kernels/test_*.py))

attack: $(INSTALLED)  ## damage files, kill, double and misuse the commands on tiny models (forty minutes; ARGS="kill --count 3")
	$(PYTHON) -m tests.attack $(ARGS)

evidence: $(INSTALLED)  ## test and time everything that matters on this machine's GPU within ten minutes, into runs/evidence
	$(PYTHON) -m benchmarks.evidence $(ARGS)

gates: $(INSTALLED)  ## compile every kernel of the tile table for six NVIDIA and three AMD GPUs and check it (hours, no GPU)
	$(PYTHON) -m benchmarks.static_gates --all

bench: $(INSTALLED)  ## time linear_attn and its peers on this device; ARGS="--suite op,block,model,train" on a GPU
	$(PYTHON) -m benchmarks $(ARGS)
	$(PYTHON) -m pytest -q -p no:xdist --benchmark-enable --benchmark-columns=median,iqr,rounds benchmarks

lint: $(INSTALLED)  ## check style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:  ## remove caches and build output (keeps .venv and runs/)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
