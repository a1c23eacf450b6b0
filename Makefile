# The few commands a person types. Everything is installed into $(VENV); nothing outside this folder changes.
#   make demo     render scenes, pre-train a small network on the CPU, show what it learned
#   make test     the whole Python test suite
#   make bench    measure the ops against PyTorch, torch.compile, attention kernels and lightly; OUT=folder
#   make gpu      on a machine with a GPU: build for it, test, sanitize, measure; PART="smoke bench" OUT=folder
#   make schema   after a change of the options: densecl_ext/recipes/schema.json anew
#   make docs     these pages and the API's reference as HTML: build/docs/site/index.html
#   make lint     formatting, lint and types, of Python and C++
# Needs Python 3.10+ (with its headers), a C++20 compiler and make.

PYTHON ?= python3
VENV ?= .venv
SANITIZE ?= none
OUT ?= build/bench

BIN := $(VENV)/bin
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := $(CPP) setup.py pyproject.toml $(wildcard build_backend/*.py) densecl_ext/_version.py
comma := ,
CPP_BUILD := build/cpp-$(subst $(comma),-,$(SANITIZE))

.PHONY: help build demo test bench gpu schema docs lint format cpp-test cuda-check clean

help:
	@sed -n '2,8s/^# *//p' Makefile

# The environment with the pinned packages.
$(VENV)/.packages: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The extension modules, in place. The first time pip also installs the `densecl` command; later on ninja compiles only
# what changed.
$(VENV)/.built: $(VENV)/.packages $(BUILD_INPUTS)
	@if [ ! -x $(BIN)/densecl ]; then \
	  echo "building densecl_ext (log: $(VENV)/build.log)"; \
	  $(BIN)/python -m pip install --verbose --no-deps --no-build-isolation -e . > $(VENV)/build.log 2>&1; \
	else \
	  $(BIN)/python setup.py build_ext --inplace > $(VENV)/build.log 2>&1; \
	fi || { tail -n 40 $(VENV)/build.log; exit 1; }
	@sed -n '/build summary/,/compile time/p' $(VENV)/build.log
	@touch $@

build: $(VENV)/.built

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

test: $(VENV)/.built
	$(BIN)/python -m pytest

$(VENV)/.bench-packages: $(VENV)/.packages benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	@touch $@

# DENSECL_BENCH_PHOTOS=folder of photographs measures data loading too; BENCH="--quick" or "-k ema" runs less.
bench: $(VENV)/.built $(VENV)/.bench-packages
	$(BIN)/python -m benchmarks --out $(OUT) $(BENCH)

# Needs no package index: it runs under $(PYTHON), with the torch that is there. PART: build, smoke, test, sanitize, bench,
# step, or several of them; GPU="--seconds 300 --archive FILE" says how long and where the archive of all results goes.
PART ?= all
gpu:
	$(PYTHON) -m tools.gpu --part $(PART) --out $(if $(filter file,$(origin OUT)),build/gpu,$(OUT)) $(GPU)

# The CUDA kernels' machine code: no spills, and Hopper's instructions where they belong.
cuda-check: $(VENV)/.built
	$(BIN)/python csrc/tests/machine_code.py densecl_ext/_C_cuda*.so

schema: $(VENV)/.built
	$(BIN)/python -c "from densecl_ext.train import recipes; recipes.SCHEMA.write_text(recipes.recipe_schema())"

# An environment of its own: it needs neither torch nor the built modules. The pages are links into the repository.
DOCS := build/docs
$(DOCS)/env/.packages: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)/env
	$(DOCS)/env/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

docs: $(DOCS)/env/.packages
	@mkdir -p $(DOCS)/pages/benchmarks
	@ln -sfn $(CURDIR)/README.md $(CURDIR)/CONTRIBUTING.md $(CURDIR)/docs $(DOCS)/pages/
	@ln -sfn $(CURDIR)/benchmarks/results $(DOCS)/pages/benchmarks/results
	NO_MKDOCS_2_WARNING=1 $(DOCS)/env/bin/mkdocs build --strict --config-file docs/mkdocs.yml

lint: $(VENV)/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The kernels' own tests, without torch: make cpp-test SANITIZE=address,undefined
cpp-test: $(VENV)/.packages
	$(BIN)/cmake -S . -B $(CPP_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  "-DDENSECL_SANITIZE=$(SANITIZE)"
	$(BIN)/cmake --build $(CPP_BUILD)
	$(BIN)/ctest --test-dir $(CPP_BUILD) --output-on-failure

clean:
	rm -rf build *.egg-info densecl_ext/*.so densecl_ext/_build_info.json $(VENV)/.built
