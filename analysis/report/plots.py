"""Interactive plots, drawn by plotly in the browser: accuracy against each cost, and the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures import fig1, fig14
from analysis.plotting import tradeoff as tradeoffs
from analysis.plotting.style import LOOKS, label, look
from analysis.plotting.tradeoff import Point, Tradeoff
from analysis.report.figures import csv_uri
from analysis.report.layers import Layers
from analysis.results.runs import MissingRun, Results, Run
from analysis.results.scores import Score

SYMBOLS = {
    "o": "circle", "s": "square", "v": "triangle-down", "D": "diamond", "X": "x", "^": "triangle-up", "p": "pentagon",
    "P": "cross",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A plot on the page."""

    label: str  # of the button that shows it
    spec: str  # JSON for plotly
    data: str  # data URI of the CSV
    data_name: str  # its file name
    note: str  # model, tasks, and methods that are not shown
    runs: Sequence[Run] = ()  # source of the plot


@dataclass(frozen=True)
class Cost:
    """A cost of a method."""

    label: str  # of the button
    title: str  # of the axis
    field: str  # of result.json
    usable: Callable[[Any], bool]  # predicate of the field's value
    value: Callable[[Point], float]


def _cache_share(point: Point) -> float:
    return sum(1 - score.saved for score in point.row.scores) / len(point.row.scores)


COSTS = (
    Cost("Operations", "operations of a prompt (% of MHA's)", "flops", fig1.has_operations, fig1.operations),
    Cost("KV cache", "KV cache (% of MHA's bytes)", "savings", bool, _cache_share),
    Cost("Scoring time", "time to score the tasks (% of MHA's)", "seconds", bool, fig14.seconds),
)


def tradeoff(results: Results, name: str, scores: Sequence[Score]) -> list[Plot]:
    """Return a plot of accuracy against each cost that the runs have; ``name`` is the prefix of its file."""
    plots = []
    for cost in COSTS:
        narrowed = replace(results, used=[])
        try:
            comparison = tradeoffs.compare_methods(narrowed, cost.field, cost.usable, scores)
        except MissingRun:
            continue
        data = tradeoffs.plot_data(cost.label, comparison.shares(cost.value), cost.title)
        file = f"{name}-{cost.label.lower().replace(' ', '-')}"
        note = comparison.heading("").strip() + ". " + tradeoffs.reading_notes(comparison) + comparison.notes
        plots.append(
            Plot(cost.label, _tradeoff_spec(data, comparison, cost), *csv_uri(file, data), note, narrowed.used)
        )
    return plots


def _tradeoff_spec(data: pd.DataFrame, comparison: Tradeoff, cost: Cost) -> str:
    figure = go.Figure()
    front_costs, front_accuracies = tradeoffs.front_line(data)
    figure.add_scatter(
        x=front_costs, y=front_accuracies, mode="lines", line={"dash": "dot", "width": 1.2, "shape": "hv"},
        name="Pareto front", hoverinfo="skip", meta="ink",
    )  # fmt: skip
    for name, rows in data.groupby("method", sort=False):
        method, style = str(name), look(str(name))
        for line in tradeoffs.series_lines(rows, comparison.points).values():
            if len(line) > 1:
                figure.add_scatter(
                    x=line.cost.tolist(), y=line.accuracy.tolist(), mode="lines", hoverinfo="skip", showlegend=False,
                    line={"color": style["color"], "width": 1}, legendgroup=method,
                )  # fmt: skip
        for reading, group in rows.groupby("reading", sort=False):
            _add_points(figure, group, method, str(reading), tradeoffs.series_words(rows, str(reading)))
    figure.update_layout(
        template="none", xaxis={"title": {"text": cost.title}}, yaxis={"title": {"text": "mean accuracy (%)"}},
        hovermode="closest", legend={"tracegroupgap": 0},
    )  # fmt: skip
    return spec(figure)


def _add_points(figure: go.Figure, rows: pd.DataFrame, method: str, reading: str, words: str) -> None:
    """Add the points of a method, hollow for the paper's numbers of heads read as heads combined."""
    style = look(method) | tradeoffs.READINGS[reading]["look"]
    color, symbol = style["color"], SYMBOLS[style["marker"]]
    if style.get("markerfacecolor") == "white":
        symbol += "-open"
    above, below = ((rows.high - rows.accuracy).fillna(0), (rows.accuracy - rows.low).fillna(0))
    figure.add_scatter(
        x=rows.cost.tolist(), y=rows.accuracy.tolist(), mode="markers", name=label(method) + words, legendgroup=method,
        marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 1, "color": color}},
        error_y={
            "type": "data", "array": above.tolist(), "width": 0, "thickness": 1,
            "arrayminus": below.tolist(), "symmetric": False, "color": color,
        },
        text=[_hover(row) for row in rows.itertuples()], hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def _hover(row: Any) -> str:
    interval = "" if pd.isna(row.low) else f" [{row.low:.1f}, {row.high:.1f}]"
    unit = row.unit.partition("(")[2].rstrip(")")
    return (
        f"<b>{row.label}</b><br>accuracy {row.accuracy:.2f} %{interval}<br>{row.cost:.1f} {unit}"
        f"<br>saving: {row.saving}{'<br>on the Pareto front' if row.pareto else ''}"
    )


def layers(view: Layers) -> Plot:
    """Return a plot of clusters above, correlation below, by layer."""
    figure = go.Figure()
    numbers = [row.layer for row in view.rows]
    figure.add_bar(
        x=numbers, y=[row.k if row.k is not None else row.k_offline for row in view.rows], name="clusters",
        marker={"color": LOOKS["mha"]["color"]}, width=0.6,
        hovertemplate="layer %{x}: %{y} clusters" + f" of {view.heads} heads<extra></extra>",
    )  # fmt: skip
    curves = (("correlation", "all pairs of heads", "chai"), ("within", "heads of a cluster", "dejavu"))
    measured = [curve for curve in curves if any(getattr(row, curve[0]) is not None for row in view.rows)]
    for field, name, method in measured:
        figure.add_scatter(
            x=numbers, y=[getattr(row, field) for row in view.rows], yaxis="y2", mode="lines+markers",
            name=f"correlation, {name}", line={"color": LOOKS[method]["color"], "width": 1.6}, marker={"size": 6},
            hovertemplate="layer %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        template="none", hovermode="closest",
        xaxis={"title": {"text": "layer"}, "dtick": 1 if len(numbers) <= 12 else None, "anchor": "free", "position": 0},
        yaxis={"title": {"text": "clusters"}, "range": [0, view.heads], "domain": [0.56 if measured else 0, 1]},
    )  # fmt: skip
    if measured:
        lower = {"title": {"text": "correlation"}, "range": [0, 1.03], "domain": [0, 0.44], "dtick": 0.5}
        figure.update_layout(yaxis2=lower)
    data = pd.DataFrame([asdict(row) for row in view.rows])
    return Plot("Layers", spec(figure), *csv_uri(f"layers-{view.model}", data), "", view.runs)


def spec(figure: go.Figure) -> str:
    """Return a figure as JSON that can stand within a script element."""
    return str(figure.to_json()).replace("</", "<\\/")
