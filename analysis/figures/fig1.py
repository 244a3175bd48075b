"""Accuracy against operations, for every method that has runs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.plotting import page, tradeoff
from analysis.plotting.tradeoff import Point
from analysis.results.runs import Results
from analysis.results.scores import ACCURACY

TITLE = "Accuracy against operations (paper, Figure 1)"
QUERY = ACCURACY
UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1.0, "FLOP"))


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw one panel."""
    comparison = tradeoff.compare_methods(results, "flops", has_operations)
    data = tradeoff.plot_data("operations", comparison.shares(operations), "% of MHA's operations")
    figure = page.new(comparison.heading(TITLE), 3.9)
    axes = figure.subplots()
    tradeoff.draw_panel(axes, data, comparison.points)
    flops = comparison.points[0].row.scores[0].run.result["flops"]
    scale, unit = next((scale, unit) for scale, unit in UNITS if flops["mha"] >= scale)
    axes.set_xlabel(
        f"operations of a prompt of {flops['tokens']:,} tokens (% of MHA's {flops['mha'] / scale:.3g} {unit})"
    )
    notes = "Operations are each algorithm's own, whether skipped here or not (docs/performance.md). "
    tradeoff.finish(figure, comparison, notes)
    return figure, data


def has_operations(flops: object) -> bool:
    """Return whether a run's field ``flops`` is complete."""
    return isinstance(flops, dict) and all(isinstance(flops.get(key), int) for key in ("tokens", "method", "mha"))


def operations(point: Point) -> int:
    """Return the operations of a prompt."""
    return point.row.scores[0].run.result["flops"]["method"]
