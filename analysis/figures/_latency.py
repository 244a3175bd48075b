"""What Figures 12a and 12b share: times of the whole model on the left, speed-ups and their limits on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.figures import _look
from analysis.saved import MAIN, Results, Run, base_name

EXPERIMENT = "latency"
COMMAND = "python run.py experiment=latency method=chai model=llama7b model.random_init=true"
COLUMNS = (
    "part", "phase", "length", "k", "implementation", "baseline", "ms", "ms_p25", "ms_p75", "rounds",
    "speedup", "best_baseline", "limit",
)  # fmt: skip
FIELDS = ("heads_kept", "heads", "dtype", "batch_size", "versions")
MEASURED, LIMIT, PAPER = "measured", "limit", "paper"
MOST_COUNTS = 3  # cluster counts shown of the attention alone


@dataclass(frozen=True)
class Claim:
    """The paper's: a speed-up at a sequence length (tokens), and how its point is labelled."""

    speedup: float
    length: int
    label: str


def draw_latency(results: Results, phase: str, title: str, note: str, claim: Claim) -> tuple[Figure, pd.DataFrame]:
    """The figure of a phase and its data.

    Args:
        results: where the run is looked for.
        phase: ``prefill`` or ``decode``.
        title: the first line of the heading; in small letters, also what the time is called on its axis.
        note: for the footer: whether clustering is part of the time.
        claim: the paper's, on the right where the run is of its model.

    Raises:
        MissingRun: no run has a method beside its baselines for this phase of the whole model.
    """

    def usable(run: Run) -> bool:
        rows = run.table[(run.table.part == "model") & (run.table.phase == phase)]
        return set(rows.baseline) == {True, False}

    run = results.newest(EXPERIMENT, COLUMNS, FIELDS, usable)
    data = plotted(run, phase, claim)
    rounds = run.table[(run.table.part == "model") & (run.table.phase == phase)].rounds.min()
    notes = f"Medians of {rounds} interleaved rounds, whiskers are quartiles; {note}."
    figure, (left, right) = _look.panels(run, f"{title} against sequence length")
    draw_times(left, data[data.panel == "time"], title)
    draw_speedups(right, data[data.panel == "speedup"], phase)
    _look.finish(figure, run, notes)
    return figure, data


def plotted(run: Run, phase: str, claim: Claim) -> pd.DataFrame:
    """One row for each point: panel, series, source, implementation, k, length_tokens, value, unit, quartiles, run."""
    table = run.table[run.table.phase == phase].sort_values("length")
    model = table[table.part == "model"]
    scale, unit = (1e3, "s") if model.ms.max() >= 1e4 else (1.0, "ms")
    rows: list[dict[str, Any]] = []

    def add(row: Any, panel: str, series: str, source: str, value: Any, unit: str, **more: Any) -> None:
        point = {"panel": panel, "series": series, "source": source, "implementation": row.implementation, "k": row.k}
        point |= {"length_tokens": row.length, "value": value, "unit": unit, "p25": None, "p75": None}
        rows.append(point | {"best_baseline": row.best_baseline, "run": run.result["run_id"]} | more)

    for row in model.itertuples():
        quartiles = {"p25": row.ms_p25 / scale, "p75": row.ms_p75 / scale}
        add(row, "time", _look.label(row.implementation), MEASURED, row.ms / scale, unit, **quartiles)
    own = model[~model.baseline]
    name, against = _look.label(own.implementation.iloc[0]), own.best_baseline.unique()
    best = _look.label(against[0]) if len(against) == 1 else f"the best of {', '.join(map(_look.label, against))}"
    for row in own.itertuples():
        add(row, "speedup", f"{name} against {best}", MEASURED, row.speedup, "x")
        if not pd.isna(row.limit):  # not known of a method without clusters in decoding
            add(row, "speedup", "limit by arithmetic", LIMIT, row.limit, "x")
    for k, same in some_counts(table[(table.part == "attention") & ~table.baseline], run.result["heads"]):
        for row in same.itertuples():
            add(row, "speedup", f"attention alone, k = {k}", MEASURED, row.speedup, "x")
            add(row, "speedup", f"attention alone, k = {k}", LIMIT, row.limit, "x")
    paper = {"panel": "speedup", "series": claim.label, "source": PAPER, "length_tokens": claim.length}
    if base_name(run.model) in MAIN:  # the paper says nothing about other models
        rows.append(paper | {"value": claim.speedup, "unit": "x"})
    return pd.DataFrame(rows).astype({"k": "Int64"})


def some_counts(attention: pd.DataFrame, heads: int) -> list[tuple[int, pd.DataFrame]]:
    """The attention's rows by cluster count: the smallest, the middle and the largest that clusters at all."""
    counts = sorted({int(k) for k in attention.k.dropna() if k < heads})
    if len(counts) > MOST_COUNTS:
        counts = [counts[0], counts[len(counts) // 2], counts[-1]]
    return [(k, attention[attention.k == k]) for k in counts]


def draw_times(axes: Axes, data: pd.DataFrame, title: str) -> None:
    """Every baseline and the method, with quartile whiskers."""
    for name, points in data.groupby("implementation", sort=False):
        whiskers = [points.value - points.p25, points.p75 - points.value]
        style: dict[str, Any] = {
            "capsize": 2.5,
            "elinewidth": 0.9,
            "capthick": 0.9,
            "markerfacecolor": "none",
            "markeredgewidth": 1.2,
        }
        axes.errorbar(
            points.length_tokens, points.value, [side.clip(lower=0) for side in whiskers],
            label=points.series.iloc[0], **(style | _look.look(str(name))),
        )  # fmt: skip
    _look.length_axis(axes, data.length_tokens)
    axes.set_ylabel(f"{title.lower()} ({data.unit.iloc[0]})")
    if data.value.max() > 8 * data.value.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, data.p75.max() * 1.08)


def draw_speedups(axes: Axes, data: pd.DataFrame, phase: str) -> None:
    """The model's speed-up and the attention's, each with its limit, and the paper's claim."""
    extras = iter(_look.EXTRA)
    for series, points in data.groupby("series", sort=False):
        measured, limit = points[points.source == MEASURED], points[points.source == LIMIT]
        if (points.source == PAPER).all():
            axes.plot(points.length_tokens, points.value, "*", color=_look.INK, markersize=10, label=series, zorder=5)
        elif measured.empty:
            unit = "operations" if phase == "prefill" else "bytes read"
            axes.plot(limit.length_tokens, limit.value, "--", color=_look.INK, linewidth=1, label=f"{series} ({unit})")
        elif limit.empty:
            axes.plot(
                measured.length_tokens,
                measured.value,
                label=series,
                zorder=4,
                **_look.look(measured.implementation.iloc[0]),
            )
            last = measured.iloc[-1]
            axes.annotate(
                f"{last.value:.2f}{_look.TIMES}",
                (last.length_tokens, last.value),
                (6, 0),
                textcoords="offset points",
                va="center",
            )
        else:
            style = next(extras) | {"linewidth": 0.8, "markersize": 4, "markerfacecolor": "none"}
            axes.plot(measured.length_tokens, measured.value, label=f"{series} (dotted: its limit)", **style)
            axes.plot(limit.length_tokens, limit.value, ":", color=style["color"], linewidth=0.9)
    _look.length_axis(axes, data.length_tokens, room=0.19)
    _look.ratio_axis(axes, data.value)
    axes.set_ylabel("speed-up over best baseline")
