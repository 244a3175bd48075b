"""CHAI's costs and savings at a glance, one line for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.report.costs import kv_saved, latency_run, speedup
from analysis.report.source import Source
from analysis.results.runs import Run, base_name, optional
from analysis.stats import Interval, mean_over_tasks
from analysis.tables.cells import Table
from analysis.tables.specs import task_name


@dataclass(frozen=True)
class Line:
    """A model at a glance; ``None``: not measured."""

    model: str
    mean: Interval | None  # CHAI's change of the mean accuracy, points
    worst: Interval | None  # change on the task that loses the most, points
    worst_task: str
    tasks: tuple[int, int]  # tasks that are compared, of all
    saved: float | None  # share of the KV cache, %
    first: Interval | None  # speedup of the first token at the longest length
    next: Interval | None  # speedup of the next tokens
    length: int | None  # the longest length
    runs: int  # finished runs of all experiments
    seconds: float  # duration of these runs
    devices: Sequence[str]  # devices of these runs


def line(table: Table, source: Source, runs: Sequence[Run]) -> Line:
    """Summarize one model, given its table and all finished runs."""
    model, row = table.model, table.row_of("chai")
    changes = {cell.task: cell.change for cell in row.changes if cell.change} if row else {}
    worst = min(changes, key=lambda task: changes[task].difference, default=None)
    # The KV cache's saving from a memory run, else from the accuracy runs.
    memory = optional(kv_saved, source, model)
    saved = memory.interval.value if memory else None
    if saved is None and row is not None and row.saved is not None:
        saved = 100 * row.saved
    # The longest length of the latency run that the speedups are of.
    latency = optional(latency_run, source, model)
    lengths = [] if latency is None else latency.table[latency.table.part == "model"].length
    length = int(max(lengths)) if len(lengths) else None
    first, later = (
        optional(speedup, source, model, phase, str(length)) if length else None for phase in ("prefill", "decode")
    )
    model_runs = [run for run in runs if base_name(run.model) == model]
    seconds = sum(float(run.result.get("seconds") or 0) for run in model_runs)
    return Line(
        model,
        mean_over_tasks(list(changes.values())).points if changes else None,
        changes[worst].points if worst else None, task_name(worst) if worst else "",
        (len(changes), len(table.spec.tasks)), saved,
        first.interval if first else None, later.interval if later else None, length,
        len(model_runs), seconds, sorted({run.device for run in model_runs}),
    )  # fmt: skip
