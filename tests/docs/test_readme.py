"""The Python examples of the README run as they stand, offline, from the root of the repository."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.docs.pages import REPOSITORY, blocks

EXAMPLES = [block.text for block in blocks(REPOSITORY / "README.md") if block.language == "python"]


def test_there_is_an_example():
    assert len(EXAMPLES) >= 1


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example {index}" for index in range(len(EXAMPLES))])
def test_every_python_block_runs(code):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-3000:]
    if "cache.nbytes" in code:
        # The ratio that the comment states: the cache keeps the keys of 8 + 6 + 4 + 4 of 64 heads, and all values.
        ratio = (1 + 22 / 64) / 2
        assert f"# {ratio}" in code and f"\n{ratio}\n" in run.stdout
