"""``python -m experiments.gpu`` (``make gpu``): all checks that need a GPU, in one command and one table.

With a CUDA device: kernels, clusters and engine are compared with the CPU, then attention alone and LLaMA-7B's shape
with random weights are measured in ordinary runs of ``experiment=latency``, whose speedups are compared with what is
asked. The runs are repeated each time, for a run's folder depends neither on the GPU nor on the version of the code.
Without a CUDA device, the kernels are compared under Triton's interpreter, and compiled for an A100 and an H100.

Exit codes: 0 everything holds, 1 a check falls short or a run failed, 2 invalid command line; else as ``run.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from chai.kernels import available, is_interpreted
from chai.kernels.compiler import INSTALLED
from experiments.config.aliases import replace_aliases
from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.config.validate import check_overrides
from experiments.execute import run_config
from experiments.gpu.correctness import (
    check_clustering,
    check_engine,
    check_generate,
    check_kernels,
    check_settings,
)
from experiments.gpu.report import Outcome, show
from experiments.gpu.speed import RUNS, Measured, judge
from experiments.runs.resolve import run_folders
from experiments.system.console import console, log_error, log_info, logged_errors
from experiments.system.interrupts import exit_when_interrupted

#: Random shapes of each kernel without a GPU, where they are interpreted.
INTERPRETED_PROBLEMS = 40
INTERPRETED_TOKENS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser("python -m experiments.gpu", description="All checks that need a GPU.")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of every run, such as results_dir=DIR")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        for measured in RUNS:
            check_overrides(replace_aliases([*measured.overrides, *options.settings]))
        with exit_when_interrupted():
            outcomes = on_gpu(options.settings) if torch.cuda.is_available() else without_gpu()
    except ConfigError as error:
        log_error(str(error))
        return 2
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    title = f"{name}, torch {torch.__version__}, {time.monotonic() - began:.0f} s"
    show(outcomes, title, LEGEND if torch.cuda.is_available() else LEGEND_WITHOUT)
    return int(any(outcome.holds is False for outcome in outcomes))


LEGEND = (
    "Speedups over the fastest multi-head attention (cuDNN, flash, efficient, eager, or in the same engine), medians\n"
    "and quartiles of interleaved rounds. Limit: by the operations (prefill) or bytes (decode) of arithmetic."
)
LEGEND_WITHOUT = (
    "There is no CUDA device: the kernels ran under Triton's interpreter and were compiled, and nothing was measured."
)


def on_gpu(settings: Sequence[str]) -> list[Outcome]:
    """Do all checks on the CUDA device."""
    device = torch.device("cuda")
    outcomes: list[Outcome] = []
    if is_interpreted():
        raise ConfigError("TRITON_INTERPRET is set, with which kernels run on the CPU; valid: unset")
    if not available(device):
        return [Outcome("kernels", "Triton is missing", "pip install chai-attention[gpu]", False)]
    log_info("kernels, clusters and engine against the CPU")
    for check in (check_kernels, check_settings, check_clustering, check_engine, check_generate):
        outcomes += guarded(check.__name__.replace("_", " "), partial(check, device))
    for number, measured in enumerate(RUNS, 1):
        log_info(f"[{number}/{len(RUNS)}] {measured.name}")
        outcomes += guarded(measured.name, partial(measure, measured, settings))
        torch.cuda.empty_cache()
    return outcomes


def guarded(name: str, check: Callable[[], Iterable[Outcome]]) -> list[Outcome]:
    """Return the outcomes of a check up to its first error, which falls short: the others are still worth seeing."""
    outcomes: list[Outcome] = []
    try:
        with torch.no_grad():
            outcomes.extend(check())
    except Exception as error:
        traceback.print_exc()
        outcomes.append(Outcome(name, f"{type(error).__name__}: {error}".splitlines()[0][:80], "", False))
    return outcomes


def measure(measured: Measured, settings: Sequence[str]) -> list[Outcome]:
    """Do one run without its own table, and compare it with what is asked."""
    config = compose_config(replace_aliases([*measured.overrides, "force=true", *settings]))
    (folder,) = run_folders(config)
    console.quiet = True
    try:
        code = run_config(config)
    finally:
        console.quiet = False
    if code or not folder.is_done:
        reason = logged_errors[-1] if logged_errors else f"see {folder.path}"
        return [Outcome(measured.name, f"failed: {reason}", "", False)]
    return list(judge(measured, folder.path))


def without_gpu() -> list[Outcome]:
    """Do what can be done without a CUDA device, each part in a process with Triton's mode that it needs."""
    if not INSTALLED:
        return [Outcome("kernels", "Triton is missing", "pip install chai-attention[gpu]", False)]
    if not is_interpreted():
        log_info("no CUDA device: the kernels under Triton's interpreter")
        interpret = {**os.environ, "TRITON_INTERPRET": "1"}
        checked = subprocess.run([sys.executable, "-m", "experiments.gpu"], env=interpret, check=False).returncode
        log_info("no CUDA device: the kernels compiled for sm_80 and sm_90")
        compiled = subprocess.run([sys.executable, "-m", "chai.kernels.compile"], check=False).returncode
        return [
            Outcome("kernels, interpreted", "see above", "as exact as stock attention", checked == 0),
            Outcome("kernels, compiled", "see above", "no spilled registers for sm_80 and sm_90", compiled == 0),
        ]
    device = torch.device("cpu")
    with torch.no_grad():
        return [*check_kernels(device, INTERPRETED_PROBLEMS), *check_engine(device, INTERPRETED_TOKENS, ("chai",))]


if __name__ == "__main__":
    sys.exit(main())
