"""Accuracy against measured time, for every method there is."""

from __future__ import annotations

from collections import defaultdict

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import _tradeoff
from analysis.figures._tradeoff import Comparison, Point
from analysis.saved import Results, Run

TITLE = "Accuracy against measured time (paper, Figure 14)"
EXPERIMENT = _tradeoff.EXPERIMENT
COMMAND = _tradeoff.COMMAND
COLUMNS = ("part", "phase", "length", "implementation", "baseline", "speedup")
FIELDS = ("heads_kept", "dtype")


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Time to score the tasks; and time to first token, where latency runs measured a method of those shown."""
    comparison = _tradeoff.compared(results, "seconds", lambda value: isinstance(value, (int, float)))
    points = _tradeoff.shares(comparison.points, seconds)
    panels = [_tradeoff.plotted("scoring", points, "% of MHA's scoring time")]
    labels = [f"time to score the tasks\n(% of MHA's {seconds(comparison.points[0]):.3g} s)"]
    notes = "Scoring: each run timed once, with all that its implementation does, masks included. "
    devices = sorted({score.run.device for point in comparison.points for score in point.scores})
    if len(devices) > 1:
        notes += f"They ran on several devices ({', '.join(devices)}), so these times can't be compared. "
    first, length, where = first_token(results, comparison)
    if first:
        panels.append(_tradeoff.plotted("first token", first, "% of the best baseline's time to first token"))
        notes += f"First token: {where}. "
        labels.append(f"time to first token, {length:,} tokens\n(% of MHA's, the best baseline)")
    figure = Figure(layout="constrained")
    for axes, data, label, own in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False).flat, panels, labels, (points, first), strict=False
    ):
        _tradeoff.draw_panel(axes, data, [point for point, _ in own])
        axes.set_xlabel(label)
    _tradeoff.finish(figure, comparison, TITLE, notes)
    return figure, pd.concat(panels, ignore_index=True)


def seconds(point: Point) -> float:
    """To score all tasks."""
    return sum(score.run.result["seconds"] for score in point.scores)


def first_token(results: Results, comparison: Comparison) -> tuple[list[tuple[Point, float]], int, str]:
    """Points that latency runs of the same model, method and heads measured, at the longest length on one device.

    Returns:
        Each with its time as a share of the best baseline's in the same run, none if there are no such runs; the
        length; the device and dtype.
    """
    found: dict[tuple[str, str, int], dict[int, tuple[float, Run]]] = defaultdict(dict)
    runs = results.of(f"{comparison.model},{comparison.model}-random").runs("latency", COLUMNS, FIELDS)
    for run in sorted(runs, key=lambda run: run.updated):  # the newest last
        rows = run.table[(run.table.part == "model") & (run.table.phase == "prefill") & ~run.table.baseline]
        for place, point in enumerate(comparison.points):
            kept = point.scores[0].run.result["savings"]["heads_kept"]
            if (run.method, run.result["heads_kept"]) == (point.method, kept) and len(rows):
                row = rows.loc[rows.length.idxmax()]
                found[run.device, run.result["dtype"], int(row.length)][place] = (1 / row.speedup, run)
    if not found:
        return [], 0, ""
    chosen = max(found, key=lambda key: (len(found[key]), key[2], key))
    results.used += [run for _, run in found[chosen].values()]
    measured = {place: share for place, (share, _) in found[chosen].items()}
    baseline = {place: 1.0 for place, point in enumerate(comparison.points) if point.method == "mha"}
    times = baseline | measured
    return [(comparison.points[place], times[place]) for place in sorted(times)], chosen[2], f"{chosen[0]}, {chosen[1]}"
