# `make demo` and `make test` need Python >= 3.11 and make, nothing else: each builds what it lacks first.
PYTHON ?= python3
VENV ?= .venv
# Passed to pip as it is, e.g. PIP_FLAGS="--index-url …" for a mirror or another build of torch.
PIP_FLAGS ?=
# Passed to pytest, e.g. TESTS="-k imaging -x".
TESTS ?=
# Processes of the tests, one thread each.
WORKERS ?= 2
DEMO_DIR ?= demo

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
CORE := $(VENV)/.core.stamp
DEV := $(VENV)/.dev.stamp
# Benchmarks on data that are not in the repository; each says where to get its own.
WITH_DATA := benchmarks/motion.py benchmarks/pie_bench.py benchmarks/speech.py
LINTED = $(wildcard diffusers_ext training tests benchmarks spaces docs)

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help demo test quality style bench docs data nightly reliability lowest upstream clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         pictures edited by words, restored, steered and drawn in one step, in $(DEMO_DIR)/ (offline after the install)"
	@echo "make test         format, lint, types, doc snippets and the fast tests"
	@echo "make quality      the first four of those;  make style  formats and fixes"
	@echo "make bench        the measurements in benchmarks/, but for motion.py, pie_bench.py and speech.py, which need data"
	@echo "make docs         the documentation as HTML in docs/_build/html, its gallery run anew; snippets and links are checked"
	@echo "make data         builds the picture set of the demo model"
	@echo "make nightly      the slow tests;  make reliability  fuzzing, kills, damaged files"
	@echo "make lowest       the fast tests with the lowest versions that setup.cfg allows, in an environment of its own"
	@echo "make upstream CHECKOUT=path   the suites of a diffusers checkout against our classes"
	@echo "make clean        removes what the other targets made, except the environment"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python >= 3.11 is needed, found " + sys.version.split()[0] + "; name another one with make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)

# torch goes in first, by itself, so that the version of constraints.txt is taken from wherever it is found
# and the later resolution does not look for it again.
$(CORE): setup.cfg pyproject.toml constraints.txt | $(PY)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(DEV): $(CORE)
	$(PIP) -e ".[dev,training]"
	@touch $@

demo: $(CORE)
	$(VENV)/bin/diffusers-ext demo --output $(DEMO_DIR)

test: quality
	$(PY) -m pytest -n $(WORKERS) --dist worksteal --ignore=tests/docs $(TESTS)

quality: $(DEV)
	$(PY) -m ruff format --check $(LINTED)
	$(PY) -m ruff check $(LINTED)
	$(PY) -m mypy
	$(PY) -m pytest -q -n $(WORKERS) tests/docs

style: $(DEV)
	$(PY) -m ruff check --fix $(LINTED)
	$(PY) -m ruff format $(LINTED)

bench: $(DEV)
	$(PIP) -e ".[bench]"
	for script in $(filter-out $(WITH_DATA),$(wildcard benchmarks/*.py)); do $(PY) $$script || exit 1; done

docs: $(DEV)
	$(PIP) -e ".[docs]"
	$(PY) -m pytest -q tests/docs
	$(PY) -m sphinx -q -E -W --keep-going -b html docs docs/_build/html
	$(VENV)/bin/diffusers-ext demo --output $(DEMO_DIR)
	cp $(DEMO_DIR)/sheet.png docs/images/demo.png
	cp $(DEMO_DIR)/distillation.png docs/images/distillation.png

data: $(DEV)
	$(PY) -m training.data.build_emoji_scenes

nightly: $(DEV)
	$(PY) -m pytest -m "slow or nightly" $(TESTS)

reliability: $(DEV)
	$(PY) -m pytest -m reliability --durations=10 $(TESTS)

lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install -q --disable-pip-version-check -c constraints-lowest.txt $(PIP_FLAGS) torch
	$(VENV)-lowest/bin/python -m pip install -q --disable-pip-version-check -c constraints-lowest.txt $(PIP_FLAGS) -e ".[dev,training]"
	$(VENV)-lowest/bin/python -m pytest -n $(WORKERS) --dist worksteal --ignore=tests/docs $(TESTS)

upstream: $(DEV)
	@test -n "$(CHECKOUT)" || { echo "name a checkout of diffusers: make upstream CHECKOUT=path" >&2; exit 2; }
	DIFFUSERS_CHECKOUT="$(CHECKOUT)" $(PY) -m pytest -m upstream $(TESTS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo docs/_build docs/auto_gallery docs/models
	find diffusers_ext training tests -name __pycache__ -type d -prune -exec rm -rf {} +
