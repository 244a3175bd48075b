"""The training loop of predictors and of the embedded model: progress, checkpoints, installation of the outcome."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError, RunFolder
from experiments.system.console import console, log_info

#: Steps between two lines in a log file, which shows no progress bar.
LOG_EVERY = 100


@dataclass
class Position:
    """Steps and seconds of a training so far; part of its checkpoint."""

    step: int = 0
    seconds: float = 0.0


def train(
    position: Position,
    *,
    steps: int,
    checkpoint_every: int,
    folder: RunFolder,
    take_step: Callable[[int], dict[str, Tensor]],
    save_checkpoint: Callable[[], None],
) -> None:
    """Take all remaining steps, with a checkpoint at regular intervals.

    Args:
        position: advanced step by step.
        steps: number of steps in total.
        checkpoint_every: steps between two checkpoints.
        folder: of the run, where progress is noted.
        take_step: takes the step of this number; returns scalars to show, ``loss`` first.
        save_checkpoint: writes everything that the training depends on.

    Raises:
        RunError: the loss is not finite.
    """
    if position.step:
        log_info(f"resuming from step {position.step}")
    with progress_bar("step") as progress:
        bar = progress.add_task("", total=steps, completed=position.step, scalars="")
        while position.step < steps:
            began = time.perf_counter()
            scalars = take_step(position.step)
            if not torch.isfinite(scalars["loss"]):
                raise RunError(f"non-finite loss at step {position.step}; try a lower experiment.learning_rate")
            position.step += 1
            position.seconds += time.perf_counter() - began
            # Show and note the progress.
            line = ", ".join(f"{name} {value.item():.4f}" for name, value in scalars.items())
            progress.update(bar, completed=position.step, scalars=line)
            folder.progress(position.step, steps)
            if position.step % LOG_EVERY == 0 and not console.is_terminal:
                log_info(f"step {position.step} of {steps}: {line}")
            if position.step % checkpoint_every == 0 and position.step < steps:
                save_checkpoint()


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
