"""The training loop of predictors and of the embedded model: progress, checkpoints, installation of the outcome."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
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


@dataclass
class Position:
    """Progress of a training; part of its checkpoint."""

    step: int = 0
    seconds: float = 0.0


def train(
    run: Run[Any],
    position: Position,
    take_step: Callable[[int], dict[str, Tensor]],
    state_dict: Callable[[], dict[str, Any]],
) -> None:
    """Take all remaining steps of a run, with a checkpoint every ``checkpoint_every`` of them.

    ``take_step`` returns scalars to show, among them ``loss``; ``state_dict`` returns what a checkpoint holds.
    """
    steps = run.options.steps
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
            run.folder.progress(position.step, steps)
            if position.step % LOG_EVERY == 0 and not console.is_terminal:
                log_info(f"step {position.step} of {steps}: {line}")
            if position.step % run.options.checkpoint_every == 0 and position.step < steps:
                checkpoint = state_dict() | asdict(position)
                write_atomically(run.folder.path / CHECKPOINT, lambda path, saved=checkpoint: torch.save(saved, path))


def load_checkpoint(run: Run[Any]) -> tuple[dict[str, Any] | None, Position]:
    """Return what ``state_dict`` returned at the last checkpoint, on the CPU, if there is one; and the position."""
    path = run.folder.path / CHECKPOINT
    if not path.exists():
        return None, Position()
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return saved, Position(saved["step"], saved["seconds"])


def training_result(position: Position, metrics: dict[str, float], n: int) -> dict[str, Any]:
    """Return the part of ``result.json`` of a training that has measured ``metrics`` over ``n`` steps or tokens."""
    return {
        "metrics": metrics,
        "n": n,
        "stderr": {},
        "savings": {"kind": "none", "kv_bytes": 0, "kv_bytes_mha": 0, "heads_kept": []},
        "seconds": round(position.seconds, 3),
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
