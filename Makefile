# make tune: from a fresh clone to a tuned profile.   make test: every test.   make lint.
# make encoder MODEL=DIR: a learned encoder for a model.
# All of them share one environment, .venv, made on first use.

PYTHON ?= python3
# What the tests and the tuner start is some hundred processes: none shall compile Python anew.
export PYTHONDONTWRITEBYTECODE :=
# Processes that run tests, and the threads of each one's kernels.
TEST_WORKERS ?= 2
TEST_THREADS ?= 2
TUNE_ARGS ?=
# The folder of the model to learn an encoder for, and where the encoder goes.
MODEL ?= $(HATA_TEST_MODEL)
ENCODER ?= build/$(notdir $(abspath $(MODEL))).safetensors
LEARN_ARGS ?=

BIN := .venv/bin
# --no-compile: Python compiles what is imported, which is a small part of what is installed.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
LOCKED := $(PIP) --constraint constraints.txt
INSTALLED := .venv/.installed

# The adapter is tested with three releases of transformers: the one in .venv, and these, which lie
# beside it and are put in front of it.
OTHER_TRANSFORMERS := 5.17.0 5.23.0
OTHER_INSTALLED := $(OTHER_TRANSFORMERS:%=.compat/transformers-%/.installed)

# torch's models are tiny here: threads of its own would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=$(TEST_THREADS) $(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal

MAKEFLAGS += --no-print-directory
.PHONY: help install tune encoder test test-main test-other test-models lint lint-imports format clean
.DELETE_ON_ERROR:
# Made by a pattern, and kept.
.SECONDARY: $(OTHER_INSTALLED)
# Two test runs side by side would only slow each other down.
.NOTPARALLEL:

help:
	@sed -n '1,3s/^# //p' Makefile

install: $(INSTALLED)

# torch goes first: nothing else must choose its release. Output goes to stderr, because the last
# line that `make tune` prints is for programs to read.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once; minutes)" >&2
	@$(LOCKED) setuptools >&2
	@$(LOCKED) torch >&2
	@$(LOCKED) --no-build-isolation --editable '.[dev]' >&2
	@touch $@

.compat/transformers-%/.installed: $(INSTALLED) Makefile
	@rm -rf $(@D)
	@$(PIP) --no-deps --target $(@D) transformers==$* >&2
	@touch $@

# The tuner's last line is the profile's absolute path, alone.
tune: $(INSTALLED)
	@$(BIN)/python -m tune --gpu auto $(TUNE_ARGS)

# Sources of the installed packages, less those that results are judged by.
encoder: $(INSTALLED)
	@test -n "$(MODEL)" || { echo "MODEL: got none, expected the folder of a model;" \
		"run: make encoder MODEL=DIR" >&2; exit 2; }
	$(BIN)/hata learn --model $(MODEL) --dataset python --without networkx seaborn \
		--out $(ENCODER) $(LEARN_ARGS)

test: test-main test-other

test-main: $(INSTALLED)
	$(PYTEST) -m "not models"

test-other: $(OTHER_TRANSFORMERS:%=test-with-%)

test-with-%: .compat/transformers-%/.installed
	HATA_EXPECT_TRANSFORMERS=$* PYTHONPATH=$(CURDIR)/.compat/transformers-$* \
		$(PYTEST) -m "hf and not models"

# Every causal language model of transformers, tiny; prints the table of docs/models.md, and writes
# it with the release in .venv.
test-models: $(INSTALLED)
	HATA_MODELS_TABLE=docs/models.md $(PYTEST) tests/hf/test_models.py -k test_family

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(MAKE) lint-imports

# The contracts are about hata.backends, so they are checked over a copy laid out as installed.
lint-imports: $(INSTALLED)
	@rm -rf build/layout && mkdir -p build/layout
	@cp -R hata tune build/layout && cp -R backends build/layout/hata/backends
	cd build/layout && ../../$(BIN)/lint-imports --config ../../.importlinter --no-cache

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv .compat build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
