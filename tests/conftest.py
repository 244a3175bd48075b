"""Everything the tests share: no network, few threads, and where the real data lies when it is there."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported: without a GPU they run on the CPU
os.environ["DISABLE_MULTIPROC"] = "1"  # no pool of lm-eval, whose forks of a process with threads may hang

import hypothesis
import pytest
import torch

# The same examples on every machine; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("explore", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads on top would wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


#: Files whose tests take a minute or more, in two shares: they start first, so that no process waits for the last one.
LONG = (("test_commands.py", "test_compile.py"), ("test_examples.py", "test_demo.py"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long tests first in each half of the tests: of two processes, each begins with one half."""
    first, second = ([item for item in items if item.path.name in names] for names in LONG)
    rest = [item for item in items if item not in first and item not in second]
    half = len(rest) // 2
    items[:] = [*first, *rest[:half], *second, *rest[half:]]


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real small model beside the checkout; not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data in ../shared, which isn't there")
    return SHARED


def pytest_terminal_summary(terminalreporter) -> None:
    """Show how many commands of the documents were run (tests/docs), and the size of the matrix of families."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    named = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    run, elsewhere = (
        {one for name, found in named if name == f"commands {kind}" for one in found} for kind in ("run", "elsewhere")
    )
    if run or elsewhere:
        terminalreporter.write_line(f"documents: {len(run)} commands run, {len(elsewhere)} covered elsewhere")
    counts = [
        (count, report.duration)
        for report in reports
        for name, count in getattr(report, "user_properties", ())
        if name == "matrix_cases" and report.when == "call"
    ]
    if counts:
        cases, seconds = map(sum, zip(*counts, strict=True))
        terminalreporter.write_line(f"matrix of families: {cases} cases in {len(counts)} tests, {seconds:.0f} s")
