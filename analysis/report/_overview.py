"""What CHAI costs and saves on each model, a line a model; and what it took to find out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.figures import _latency
from analysis.paired import Comparison, mean_over_tasks
from analysis.report._measures import Measure, Missing, Ours, Source, chai_row, kv_saved, speedup
from analysis.report._verdict import Interval
from analysis.saved import Results, Run, base_name
from analysis.tables._cells import Table
from analysis.tables._specs import MEAN, task_name


@dataclass(frozen=True)
class Line:
    """A model at a glance; numbers are ``None`` where nothing was run.

    Attributes:
        model: its name.
        mean: CHAI's change of the mean accuracy, points.
        worst: the change on the task that loses the most, points.
        worst_task: which one.
        tasks: how many have a comparison, of how many.
        saved: share of the K,V bytes saved, % of MHA's.
        first: speed-up of the first token at the longest length.
        next: likewise of the next tokens.
        length: that length.
        runs: finished, of all experiments.
        seconds: that they took.
        devices: that they ran on.
    """

    model: str
    mean: Interval | None
    worst: Interval | None
    worst_task: str
    tasks: tuple[int, int]
    saved: float | None
    first: Interval | None
    next: Interval | None
    length: int | None
    runs: int
    seconds: float
    devices: Sequence[str]


def line(table: Table, source: Source, runs: Sequence[Run]) -> Line:
    """One model.

    Args:
        table: its scores.
        source: the results.
        runs: all finished ones of the part.
    """
    model = table.model
    row = chai_row(table)
    cells = [cell for cell in row.cells if cell.task != MEAN] if row else []
    changed = [(cell.task, cell.change) for cell in cells if cell.change]
    worst = min(changed, key=lambda pair: pair[1].difference, default=None)
    saved = _try(kv_saved, source, model)
    share = saved.interval.value if saved else None
    if share is None and row is not None and row.saved is not None:
        share = 100 * row.saved
    length = _longest(source.of(model))
    first, later = (
        _try(speedup, source, model, phase, str(length)) if length else None for phase in ("prefill", "decode")
    )
    own = [run for run in runs if base_name(run.model) == model]
    whole = len([column for column in table.columns if column != MEAN])
    return Line(
        model,
        _points(mean_over_tasks([change for _, change in changed])) if changed else None,
        _points(worst[1]) if worst else None, task_name(worst[0]) if worst else "",
        (len(changed), whole), share, first.interval if first else None, later.interval if later else None, length,
        len(own), sum(float(run.result.get("seconds") or 0) for run in own), sorted({run.device for run in own}),
    )  # fmt: skip


def _points(change: Comparison) -> Interval:
    return Interval(100 * change.difference, 100 * change.low, 100 * change.high)


def _try(measure: Measure, *arguments: Any) -> Ours | None:
    try:
        return measure(*arguments)
    except Missing:
        return None


def _longest(results: Results) -> int | None:
    """Of the newest latency run of CHAI: the one that :func:`speedup` takes."""
    runs = [run for run in results.runs(_latency.EXPERIMENT, _latency.COLUMNS, _latency.FIELDS) if run.method == "chai"]
    newest = max(runs, key=lambda run: run.updated, default=None)
    if newest is None:
        return None
    lengths = newest.table[newest.table.part == "model"].length
    return int(lengths.max()) if len(lengths) else None
