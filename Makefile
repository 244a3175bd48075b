# Everything runs in .venv, made from the exact versions in constraints.txt when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo report test test-browser test-slurm lint clean

demo: $(VENV)/.installed
	$(BIN)/python run.py -m method=mha,chai,random

report: $(VENV)/.installed
	$(BIN)/python -m analysis.report

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# The report in headless Chromium. Where that is missing it is installed as root on Debian; else the tests are skipped.
test-browser: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,browser]" || true
	command -v chromium || { [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium; } || true
	$(BIN)/python -m pytest -m browser -n 0 tests/analysis

# Against a real Slurm of one node, which is installed if that is possible; says so and does nothing if it isn't.
test-slurm: $(VENV)/.installed
	if $(BIN)/python -m tests.slurm.cluster install; then $(BIN)/python -m pytest -m slurm -n 0 tests/slurm; \
	else echo "SKIPPED: the tests against a real Slurm"; fi

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
