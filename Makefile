# Two commands matter: `make demo` and `make test`. Both need Python >= 3.10, pip and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ORACLES := $(VENV)/oracles

# A folder of data files beside the checkout is used when it is there (see docs/guides/data.md).
ifneq ($(wildcard ../shared/data),)
export BATCHERY_DATA ?= $(abspath ../shared/data)
endif

.PHONY: demo test lint docs venv gpu-check readme clean

demo: venv  ## every system against its baseline, small, with an HTML report (<= 10 minutes)
	$(BIN)/batchery study --all --scale smoke --report build/report

test: venv $(ORACLES) lint docs  ## lint, types, site and the whole test suite
	$(BIN)/python -m pytest -m "not gpu" -q --durations=10

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: venv
	$(BIN)/mkdocs build --strict --site-dir build/site

readme: venv  ## rewrite the README's table from the cards and the stored results
	$(BIN)/batchery report --readme README.md

# From the source tree alone: a GPU machine needs nothing installed but torch, triton and pytest.
gpu-check:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu -q -rs

venv: $(READY)
$(READY): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# timm is an oracle in tests, and no dependency: it depends on torchvision, whose wheels are built
# for CUDA and fail beside a CPU build of torch. In a folder of its own nothing else finds it.
$(ORACLES): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade \
		--target $@ timm
	touch $@

clean:
	rm -rf build site .pytest_cache .mypy_cache .ruff_cache
