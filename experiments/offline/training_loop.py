"""The training loop of predictors and of the embedded model: progress, checkpoints, installation of the outcome."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from experiments.runs.experiment import Run
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError
from experiments.system.console import console, log_info

CHECKPOINT = "checkpoint.pt"
#: Steps between two lines in a log file, which shows no progress bar.
LOG_EVERY = 100


def train(
    run: Run[Any],
    saved: dict[str, Any] | None,
    take_step: Callable[[int], dict[str, Tensor]],
    state_dict: Callable[[], dict[str, Any]],
    is_finished: Callable[[], bool] = lambda: False,
) -> float:
    """Take the steps of a run after those of the saved checkpoint, with further checkpoints; return the total seconds.

    ``take_step`` returns scalars to show, among them ``loss``; ``state_dict`` returns what a checkpoint holds;
    ``is_finished`` ends the training before its last step.
    """
    first, seconds = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    steps = run.options.steps
    if first:
        log_info(f"resuming from step {first}")
    with progress_bar("step") as progress:
        bar = progress.add_task("", total=steps, completed=first, scalars="")
        for done in range(first + 1, steps + 1):
            if is_finished():
                log_info(f"finished after step {done - 1}")
                break
            began = time.perf_counter()
            scalars = take_step(done - 1)
            if not torch.isfinite(scalars["loss"]):
                raise RunError(f"non-finite loss at step {done - 1}; try a lower experiment.learning_rate")
            seconds += time.perf_counter() - began
            # Show and note the progress.
            line = ", ".join(f"{name} {value.item():.4f}" for name, value in scalars.items())
            progress.update(bar, completed=done, scalars=line)
            run.folder.progress(done, steps)
            if done % LOG_EVERY == 0 and not console.is_terminal:
                log_info(f"step {done} of {steps}: {line}")
            if done % run.options.checkpoint_every == 0 and done < steps:
                checkpoint = state_dict() | {"step": done, "seconds": seconds}
                write_atomically(run.folder.path / CHECKPOINT, functools.partial(torch.save, checkpoint))
    return seconds


def load_checkpoint(run: Run[Any]) -> dict[str, Any] | None:
    """Return the last checkpoint of a run, on the CPU, if there is one."""
    path = run.folder.path / CHECKPOINT
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def training_result(seconds: float, metrics: dict[str, float], n: int) -> dict[str, Any]:
    """Return the part of ``result.json`` of a training that has measured ``metrics`` over ``n`` steps or tokens."""
    return {
        "metrics": metrics,
        "n": n,
        "stderr": {},
        "savings": {"kind": "none", "kv_bytes": 0, "kv_bytes_mha": 0, "heads_kept": []},
        "seconds": round(seconds, 3),
    }


def progress_bar(unit: str) -> Progress:
    """Return a progress bar that counts ``unit``s; its tasks have a field ``scalars``."""
    columns = (
        TextColumn(unit), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[scalars]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console)


def install_files(files: Iterable[Path], target: Path) -> None:
    """Copy files into a folder of the repository, each atomically."""
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        write_atomically(target / file.name, lambda temporary, file=file: shutil.copyfile(file, temporary))
