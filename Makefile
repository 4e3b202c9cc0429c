# `make demo` and `make test` need nothing but Python 3.10 or newer: each makes .venv first.
PYTHON ?= python3
VENV ?= .venv
DATA ?= digits
BIN = $(VENV)/bin
PARALLEL = -n auto --dist worksteal

.PHONY: demo test test-all test-long test-torch coverage lint types docs notebooks smoke bench gpu clean
.DELETE_ON_ERROR:

# One marker a set of extras, so that a changed pyproject.toml or pin installs again.
$(VENV)/.%.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: $(VENV)/.examples.installed
	$(BIN)/python -m examples.te_vqgan run --preset quick --data $(DATA)

# The fast suite: about 4 minutes on two cores.
test: $(VENV)/.test.installed
	$(BIN)/python -m pytest $(PARALLEL)

# With the tests marked slow, some of which need the extra integrations, a part of dev: about 15 minutes.
test-all: $(VENV)/.dev.installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not long"

# Those marked long, which test-all leaves out.
test-long: $(VENV)/.dev.installed
	$(BIN)/python -m pytest $(PARALLEL) -m long

# The fast suite with another version of torch, such as the oldest that pyproject.toml allows. Builds for GPUs are several gigabytes.
TORCH ?= 2.9.1
test-torch:
	$(PYTHON) -m venv $(VENV)-$(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)-$(TORCH)/constraints.txt
	$(VENV)-$(TORCH)/bin/python -m pip install --quiet --constraint $(VENV)-$(TORCH)/constraints.txt torch==$(TORCH) --editable '.[test]'
	$(VENV)-$(TORCH)/bin/python -m pytest $(PARALLEL)

# test-all, measured: half as long again.
coverage: $(VENV)/.dev.installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not long" --cov --cov-report=term

lint: $(VENV)/.dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev.installed
	$(BIN)/mypy

docs: $(VENV)/.dev.installed
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

notebooks: $(VENV)/.dev.installed
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 -q -p no:cacheprovider examples/*.ipynb

smoke: $(VENV)/.examples.installed
	$(BIN)/python -m examples.te_vqgan run --preset smoke --data digits --out docs/_build/smoke

# Half an hour on two cores that do nothing else; stopped, it goes on where it was.
bench: $(VENV)/.bench.installed
	$(BIN)/python -m benchmarks

# Less than eight minutes on a machine with a GPU, which may be bare and offline: no environment is made. OUT is where
# results go, FLAGS are options such as --skip=tuned.
OUT ?= benchmarks/results/gpu
gpu:
	PYTHONPATH=src:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu --out $(OUT) $(FLAGS)

clean:
	rm -rf $(VENV) docs/_build .coverage* .mypy_cache .pytest_cache .ruff_cache
