"""Accuracy against measured time, for every method that has runs."""

from __future__ import annotations

from collections import defaultdict

import pandas as pd
from matplotlib.figure import Figure

from analysis.plotting import page, tradeoff
from analysis.plotting.tradeoff import Point, Tradeoff
from analysis.results.benchmarks import LATENCY, times
from analysis.results.runs import Results, Run
from analysis.results.scores import ACCURACY

TITLE = "Accuracy against measured time (paper, Figure 14)"
QUERY = ACCURACY


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw time to score the tasks; and time to first token, if latency runs measured one of the methods."""
    comparison = tradeoff.compare_methods(results, "seconds", bool)
    points = comparison.shares(seconds)
    panels = [(points, tradeoff.plot_data("scoring", points, "% of MHA's scoring time"))]
    labels = [f"time to score the tasks\n(% of MHA's {seconds(comparison.points[0]):.3g} s)"]
    notes = "Scoring: each run timed once, with all that its implementation does, masks included. "
    devices = sorted({score.run.device for point in comparison.points for score in point.row.scores})
    if len(devices) > 1:
        notes += f"They ran on several devices ({', '.join(devices)}), so these times cannot be compared. "
    first, length, where = first_token(results, comparison)
    if first:
        panels.append((first, tradeoff.plot_data("first token", first, "% of the best baseline's time to first token")))
        notes += f"First token: {where}. "
        labels.append(f"time to first token, {length:,} tokens\n(% of MHA's, the best baseline)")

    figure = page.new(comparison.heading(TITLE), 3.9)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (points, data), label in zip(grid.flat, panels, labels, strict=True):
        tradeoff.draw_panel(axes, data, [point for point, _ in points])
        axes.set_xlabel(label)
    tradeoff.finish(figure, comparison, notes)
    return figure, pd.concat([data for _, data in panels], ignore_index=True)


def seconds(point: Point) -> float:
    """Return the time to score all tasks."""
    return sum(score.run.result["seconds"] for score in point.row.scores)


def first_token(results: Results, comparison: Tradeoff) -> tuple[list[tuple[Point, float]], int, str]:
    """Return points whose time to first token latency runs of the same model, method and heads have measured.

    Returns:
        The points, each with its time as a share of the best baseline's in the same run, at the longest length on one
        device (empty without such runs); the length; the device and dtype.
    """
    times_of: dict[tuple[str, str, int], dict[int, tuple[float, Run]]] = defaultdict(dict)
    runs = results.of(comparison.model, with_random=True).runs(LATENCY)
    for run in sorted(runs, key=lambda run: run.updated):  # newer runs replace older ones
        rows = times(run, "prefill")
        rows = rows[~rows.baseline]
        for place, point in enumerate(comparison.points):
            counts = point.row.scores[0].run.result["savings"]["heads_kept"]
            if (run.method, run.result["heads_kept"]) == (point.row.method, counts) and len(rows):
                row = rows.loc[rows.length.idxmax()]
                times_of[run.device, run.dtype, int(row.length)][place] = (1 / row.speedup, run)
    if not times_of:
        return [], 0, ""

    # Choose the device, dtype and length with the most methods; the best baseline stands for MHA.
    device, dtype, length = max(times_of, key=lambda key: (len(times_of[key]), key[2], key))
    measured = times_of[device, dtype, length]
    results.used += [run for _, run in measured.values()]
    shares = {place: 1.0 for place, point in enumerate(comparison.points) if point.row.method == "mha"}
    shares |= {place: share for place, (share, _) in measured.items()}
    return [(comparison.points[place], shares[place]) for place in sorted(shares)], length, f"{device}, {dtype}"
