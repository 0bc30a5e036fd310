# Two commands do everything: `make bench` and `make test`. Each installs and builds what it needs.
PYTHON ?= python3
.DEFAULT_GOAL := help
.PHONY: help bench bench-all test lint format cuda_check static install clean

# An interpreter that already imports torch >= 2.11 is used in place; otherwise .venv is made.
HAS_TORCH := $(shell $(PYTHON) -c "import torch; v = torch.__version__.split('.'); print(int((int(v[0]), int(v[1])) >= (2, 11)))" 2>/dev/null)
ifeq ($(HAS_TORCH),1)
PY := $(PYTHON)
else
PY := .venv/bin/python
endif

CSRC := $(filter-out %.py,$(wildcard csrc/*.cpp csrc/*/*))
CLANG_FORMAT := $(if $(wildcard $(dir $(PY))clang-format),$(dir $(PY))clang-format,clang-format)
SOURCES := setup.py CMakeLists.txt pyproject.toml $(CSRC)
STAMP := build/.installed-$(shell echo "$(realpath $(PYTHON)) $(PY)" | cksum | cut -d' ' -f1)

# Before what takes minutes: a build without them ends in CMake's words.
HEADERS = @$(PYTHON) -c "import os, sysconfig as s; assert os.path.exists(s.get_path('include') + '/Python.h')" 2>/dev/null || { echo "Python's headers are missing: on Debian and Ubuntu, apt-get install python3-dev"; exit 1; }

help:
	@echo "make bench       fused kernels against eager PyTorch and torch.compile, in minutes (the main job)"
	@echo "make test        every kernel on every backend against the float64 reference"
	@echo "make bench-all   every row, every regime"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make format      apply ruff and clang-format"
	@echo "make cuda_check  compile every .cu for sm_80, sm_90a and sm_100a (needs nvcc, no GPU)"
	@echo "make static      static report on the Triton kernels, no GPU needed"
	@echo "make clean       remove what was built"
	@echo "PYTHON=python3 names the interpreter; one that has torch >= 2.11 is used as it is."

.venv/bin/python:
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), 'gmkernels needs Python 3.10 or newer'"
	@$(PYTHON) -m venv .venv || { echo "could not make .venv: on Debian and Ubuntu, apt-get install python3-venv"; rm -rf .venv; exit 1; }

ifeq ($(HAS_TORCH),1)
build/.requirements:
	$(HEADERS)
	@mkdir -p build
	@missing=$$($(PY) -c "import importlib.util as u; names = dict(numpy='numpy', tqdm='tqdm', safetensors='safetensors', setuptools='setuptools', wheel='wheel', cmake='cmake', ninja='ninja', pybind11='pybind11', matplotlib='matplotlib', rich='rich', sklearn='scikit-learn', scipy='scipy', pytest='pytest', hypothesis='hypothesis'); print(*[p for m, p in names.items() if u.find_spec(m) is None])"); \
	if [ -n "$$missing" ]; then echo "installing $$missing"; $(PY) -m pip install -q $$missing; fi
	@touch $@
else
build/.requirements: .venv/bin/python requirements.txt
	$(HEADERS)
	@mkdir -p build
	@echo "installing requirements.txt into .venv (torch is large: minutes on a slow line)"
	@$(PY) -m pip install -q --disable-pip-version-check --no-compile -r requirements.txt
	@touch $@
endif

$(STAMP): build/.requirements $(SOURCES)
	@echo "building gmkernels"
	@PATH="$(dir $(abspath $(PY))):$$PATH" $(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

install: $(STAMP)

bench: $(STAMP)
	$(PY) -m benchmarks --quick

bench-all: $(STAMP)
	$(PY) -m benchmarks

test: $(STAMP)
	$(PY) -m pytest $$($(PY) -c "import xdist; print('-n 2 --dist worksteal')" 2>/dev/null)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CSRC)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CSRC)

cuda_check: $(STAMP)
	$(PY) -m benchmarks.cuda_check

static: $(STAMP)
	$(PY) -m benchmarks.static_gpu

clean:
	rm -rf build dist *.egg-info gmkernels/_C*.so
