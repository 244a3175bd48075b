"""Interactive plots: accuracy against what it costs, and the layers. Drawn by plotly in the browser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures import _look, _tradeoff, fig1, fig14
from analysis.figures._tradeoff import Comparison, Point
from analysis.report._figures import csv_uri
from analysis.report._layers import Layers
from analysis.saved import MissingRun, Results, Run
from analysis.scores import Score

SYMBOLS = {
    "o": "circle", "s": "square", "v": "triangle-down", "D": "diamond", "X": "x", "^": "triangle-up", "p": "pentagon",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A plot on the page.

    Attributes:
        label: on the button that shows it.
        spec: for plotly, as JSON.
        data: data URI of its CSV.
        data_name: file name for that.
        note: what is drawn of what.
        runs: that it is drawn from.
    """

    label: str
    spec: str
    data: str
    data_name: str
    note: str
    runs: Sequence[Run] = ()


@dataclass(frozen=True)
class Axis:
    """A cost.

    Attributes:
        label: on the button.
        title: on the axis.
        field: of ``result.json``.
        usable: whether its value is sound.
        cost: of a point.
    """

    label: str
    title: str
    field: str
    usable: Callable[[Any], bool]
    cost: Callable[[Point], float]


def _has_bytes(savings: object) -> bool:
    return isinstance(savings, dict) and all(
        isinstance(savings.get(key), (int, float)) for key in ("kv_bytes", "kv_bytes_mha")
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


AXES = (
    Axis(
        "Operations", "operations of a prompt (% of MHA's)", "flops", fig1.counted,
        lambda p: fig1.operations(p.scores[0]),
    ),
    Axis(
        "K,V cache", "K,V cache (% of MHA's bytes)", "savings", _has_bytes,
        lambda p: sum(1 - score.saved for score in p.scores) / len(p.scores),
    ),
    Axis("Scoring time", "time to score the tasks (% of MHA's)", "seconds", _is_number, fig14.seconds),
)  # fmt: skip


def tradeoff(results: Results, name: str, scores: Sequence[Score]) -> list[Plot]:
    """Accuracy against each cost that runs have; none without runs.

    Args:
        results: narrowed to the part.
        name: of the files.
        scores: the part's.
    """
    plots = []
    for axis in AXES:
        own = replace(results, used=[])
        try:
            comparison = _tradeoff.compared(own, axis.field, axis.usable, scores)
        except MissingRun:
            continue
        data = _tradeoff.plotted(axis.label, _tradeoff.shares(comparison.points, axis.cost), axis.title)
        file = f"{name}-{axis.label.lower().replace(',', '').replace(' ', '-')}"
        note = comparison.heading("").strip() + ". " + comparison.notes
        plots.append(Plot(axis.label, _tradeoff_spec(data, comparison, axis), *csv_uri(file, data), note, own.used))
    return plots


def _tradeoff_spec(data: pd.DataFrame, comparison: Comparison, axis: Axis) -> str:
    figure = go.Figure()
    front = data[data.pareto].sort_values("cost")
    figure.add_scatter(
        x=[*front.cost.tolist(), float(data.cost.max())],
        y=[*front.accuracy.tolist(), float(front.accuracy.iloc[-1])], mode="lines",
        line={"dash": "dot", "width": 1.2, "shape": "hv"}, name="Pareto front", hoverinfo="skip", meta="ink",
    )  # fmt: skip
    points = dict(zip(data.index, comparison.points, strict=True))
    for method, rows in data.groupby("method", sort=False):
        look = _look.look(str(method))
        # A series of fixed numbers is joined; other settings of the method stand alone.
        series = sorted((points[i].place, i) for i in rows.index if points[i].place)
        line = rows.loc[[i for _, i in series]]
        if len(line) > 1:
            figure.add_scatter(
                x=line.cost.tolist(), y=line.accuracy.tolist(), mode="lines", line={"color": look["color"], "width": 1},
                hoverinfo="skip", showlegend=False, legendgroup=str(method),
            )  # fmt: skip
        figure.add_scatter(
            x=rows.cost.tolist(), y=rows.accuracy.tolist(), mode="markers", name=_look.label(str(method)),
            legendgroup=str(method),
            marker={
                "color": look["color"], "symbol": _symbol(look), "size": 10,
                "line": {"width": 1, "color": look["color"]},
            },
            error_y={
                "type": "data", "array": (rows.high - rows.accuracy).fillna(0).tolist(), "width": 0, "thickness": 1,
                "arrayminus": (rows.accuracy - rows.low).fillna(0).tolist(), "symmetric": False, "color": look["color"],
            },
            text=[_hover(row) for row in rows.itertuples()], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        template="none", xaxis={"title": {"text": axis.title}}, yaxis={"title": {"text": "mean accuracy (%)"}},
        hovermode="closest", legend={"tracegroupgap": 0},
    )  # fmt: skip
    return spec(figure)


def _symbol(look: dict[str, Any]) -> str:
    """The name that plotly has for a marker; open where its face is white."""
    name = SYMBOLS.get(look["marker"], "circle")
    return f"{name}-open" if look.get("markerfacecolor") == "white" else name


def _hover(row: Any) -> str:
    interval = "" if pd.isna(row.low) else f" [{row.low:.1f}, {row.high:.1f}]"
    unit = row.unit.partition("(")[2].rstrip(")")
    return (
        f"<b>{row.label}</b><br>accuracy {row.accuracy:.2f} %{interval}<br>{row.cost:.1f} {unit}"
        f"<br>saving: {row.saving}{'<br>on the Pareto front' if row.pareto else ''}"
    )


def layers(view: Layers) -> Plot:
    """Clusters above, correlation below, by layer."""
    figure = go.Figure()
    numbers = [row.number for row in view.rows]
    shown = [row.k if row.k is not None else row.found for row in view.rows]
    figure.add_bar(
        x=numbers, y=shown, name="clusters", marker={"color": _look.LOOKS["mha"]["color"]}, width=0.6,
        hovertemplate="layer %{x}: %{y} clusters" + f" of {view.heads} heads<extra></extra>",
    )  # fmt: skip
    curves = (("correlation", "all pairs of heads", "chai"), ("within", "heads of a cluster", "dejavu"))
    measured = [curve for curve in curves if any(getattr(row, curve[0]) is not None for row in view.rows)]
    for field, name, key in measured:
        figure.add_scatter(
            x=numbers, y=[getattr(row, field) for row in view.rows], yaxis="y2", mode="lines+markers",
            name=f"correlation, {name}", line={"color": _look.LOOKS[key]["color"], "width": 1.6}, marker={"size": 6},
            hovertemplate="layer %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        template="none", hovermode="closest",
        xaxis={"title": {"text": "layer"}, "dtick": 1 if len(numbers) <= 12 else None, "anchor": "free", "position": 0},
        yaxis={"title": {"text": "clusters"}, "range": [0, view.heads], "domain": [0.56 if measured else 0, 1]},
    )  # fmt: skip
    if measured:
        figure.update_layout(
            yaxis2={"title": {"text": "correlation"}, "range": [0, 1.03], "domain": [0, 0.44], "dtick": 0.5}
        )
    columns = ("number", "k", "found", "correlation", "within", "full", "kept", "saved")
    data = pd.DataFrame([{name: getattr(row, name) for name in columns} for row in view.rows]).rename(
        columns={
            "number": "layer",
            "found": "k_offline",
            "full": "mha_bytes",
            "kept": "chai_bytes",
            "saved": "saved_percent",
        }
    )
    return Plot("Layers", spec(figure), *csv_uri(f"layers-{view.model}", data), "", view.runs)


def spec(figure: go.Figure) -> str:
    """A figure as JSON that can stand within a script element."""
    return str(figure.to_json()).replace("</", "<\\/")
