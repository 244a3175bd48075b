"""Every kernel compiles for the A100 and the H100 without a GPU, and spills no registers at its default settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

COMMAND = [sys.executable, "-m", "chai.kernels.compile"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=230
    )


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_no_kernel_spills(architecture: str) -> None:
    done = run("--arch", architecture)
    lines = [line for line in done.stdout.splitlines() if f"sm_{architecture}" in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) > 20 and done.stdout.endswith("no kernel spills\n")
    assert all(re.search(rf"sm_{architecture} +[1-9]\d* +0 +[\d,]+$", line) for line in lines)


def test_interpreted_kernels_are_not_compiled() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr and not done.stdout
