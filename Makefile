# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv and installs first.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo micro quick test test-deep deep explore faults conformance lint readme docs install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[train,eval,dev]'
	touch $@

demo: install
	$(BIN)/peft-arena run demo --runs runs --report reports/demo
	@echo "open reports/demo/index.html"

micro: install
	$(BIN)/peft-arena run micro --runs runs --report reports/micro

# While editing: everything that is fast, in under three minutes on two cores.
quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not deep'

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# What the test command leaves out: every method, every family of models, injected faults, a real model.
test-deep: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deep

# Every family of models with every method of the matrix; the test command has a share of it.
deep: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/families -m deep

# Property tests with fresh draws: what fails is written as a patch that adds it to the test as an example.
explore: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m 'hypothesis and not deep' --hypothesis-profile=explore; code=$$?; \
	for patch in $$(find .hypothesis/patches -name '*.patch' -newer .venv/installed 2>/dev/null); do \
		echo "keep the example: git apply $$patch"; done; exit $$code

# Injected faults and malformed inputs: each must end in a clear line and leave a sound, resumable directory.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m deep

# The conformance suite over every shipped method; what it tried and found goes to results/conformance.json.
conformance: install
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.conformance

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The numbers of the README and the docs, from the records in results/.
readme: install
	$(BIN)/python -m scripts.numbers

docs: install
	$(BIN)/python -m peft_arena.methods.pages docs/methods

clean:
	rm -rf .venv runs reports
