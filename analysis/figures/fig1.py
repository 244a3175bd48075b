"""Accuracy against operations, for every method there is: what each gives up for what it saves."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import _tradeoff
from analysis.saved import Results
from analysis.scores import Score

TITLE = "Accuracy against operations (paper, Figure 1)"
EXPERIMENT = _tradeoff.EXPERIMENT
COMMAND = _tradeoff.COMMAND


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """One panel."""
    comparison = _tradeoff.compared(results, "flops", counted)
    flops = comparison.points[0].scores[0].run.result["flops"]
    points = _tradeoff.shares(comparison.points, lambda point: operations(point.scores[0]))
    data = _tradeoff.plotted("operations", points, "% of MHA's operations")
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    _tradeoff.draw_panel(axes, data, comparison.points)
    scale, unit = next((s, u) for s, u in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1.0, "FLOP")) if flops["mha"] >= s)
    axes.set_xlabel(
        f"operations of a prompt of {flops['tokens']:,} tokens (% of MHA's {flops['mha'] / scale:.3g} {unit})"
    )
    notes = "Operations are each algorithm's own, whether skipped here or not (docs/performance.md). "
    _tradeoff.finish(figure, comparison, TITLE, notes)
    return figure, data


def counted(flops: object) -> bool:
    """Whether a run says how many operations its method takes."""
    return isinstance(flops, dict) and all(isinstance(flops.get(key), int) for key in ("tokens", "method", "mha"))


def operations(score: Score) -> int:
    """Of a prompt."""
    return score.run.result["flops"]["method"]
