# Everything runs in .venv, made from the exact versions in constraints.txt when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slurm lint clean

demo: $(VENV)/.installed
	$(BIN)/python run.py -m method=mha,chai

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# Against a real Slurm of one node, which is installed if that is possible; says so and does nothing if it isn't.
test-slurm: $(VENV)/.installed
	if $(BIN)/python -m tests.slurm.cluster install; then $(BIN)/python -m pytest -m slurm -n 0 tests/slurm; \
	else echo "SKIPPED: the tests against a real Slurm"; fi

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
