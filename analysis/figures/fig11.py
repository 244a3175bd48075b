"""K,V cache against sequence length: what the tensors hold, what arithmetic says, what the paper claims."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import _look
from analysis.saved import MAIN, Results, Run, base_name

TITLE = "K,V cache against sequence length (paper, Figure 11)"
EXPERIMENT = "memory"
COMMAND = "python run.py experiment=memory method=chai model=llama7b model.random_init=true"
COLUMNS = ("method", "length", "cache_bytes", "formula_bytes")
FIELDS = ("heads_kept", "heads", "dtype", "batch_size", "versions")
CLAIM = 0.214  # saved, at most, with LLaMA-7B (section 4.3)
LIVE, FORMULA, PAPER = "live tensors", "arithmetic", "paper"


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Bytes on the left, the share saved on the right."""
    run = results.newest(
        EXPERIMENT, COLUMNS, FIELDS, usable=lambda run: {"mha"} < {"mha", run.method} <= set(run.table.method)
    )
    data = plotted(run)
    notes = "Keys and values, summed from the live tensors; 1 GB = 1000 MB = 10⁹ bytes."
    figure, (left, right) = _look.panels(run, "K,V cache against sequence length", widths=(1.35, 1))
    draw_cache(left, data[data.panel == "cache"])
    draw_saved(right, data[data.panel == "saved"])
    _look.finish(figure, run, notes)
    return figure, data


def plotted(run: Run) -> pd.DataFrame:
    """One row for each point: panel, method, source, length_tokens, value, unit, run."""
    sizes = run.table.pivot(index="length", columns="method", values=["cache_bytes", "formula_bytes"])
    methods = ["mha", run.method]
    scale, unit = (1e9, "GB") if run.table.cache_bytes.max() >= 1e9 else (1e6, "MB")
    rows: list[dict[str, Any]] = []

    def add(panel: str, method: str, source: str, values: pd.Series, unit: str) -> None:
        for length, value in values.items():
            rows.append(
                {"panel": panel, "method": method, "source": source, "length_tokens": length, "value": value}
                | {"unit": unit, "run": None if source == PAPER else run.result["run_id"]}
            )

    for column, source in (("cache_bytes", LIVE), ("formula_bytes", FORMULA)):
        for method in methods:
            add("cache", method, source, sizes[column][method] / scale, unit)
        add("saved", run.method, source, 100 * (1 - sizes[column][run.method] / sizes[column]["mha"]), "%")
    if base_name(run.model) in MAIN:  # the paper says nothing about other models
        full = sizes["cache_bytes"]["mha"]
        add("cache", "chai", PAPER, full * (1 - CLAIM) / scale, unit)
        add("saved", "chai", PAPER, 0 * full + 100 * CLAIM, "%")
    return pd.DataFrame(rows)


def curves(axes: Axes, data: pd.DataFrame) -> None:
    """Live tensors with markers, arithmetic as crosses on top, the paper's claim dotted."""
    for (source, method), points in data.groupby(["source", "method"], sort=False):
        name = _look.label(str(method))
        if source == LIVE:
            style = _look.look(str(method)) | {"label": f"{name}, {LIVE}"}
        elif source == FORMULA:
            # One entry in the legend stands for the arithmetic of all methods.
            first = method == data.method.iloc[0]
            style = {"color": _look.INK, "linestyle": "none", "marker": "+", "markersize": 7, "markeredgewidth": 0.7}
            style |= {"zorder": 4, "label": FORMULA if first else None}
        else:
            style = _look.PAPER | {"label": f"paper's claim: {100 * CLAIM:.1f} % saved (LLaMA-7B)"}
        axes.plot(points.length_tokens, points.value, **style)


def draw_cache(axes: Axes, data: pd.DataFrame) -> None:
    """Size by length, with the saving of the method at the longest."""
    curves(axes, data)
    lengths = sorted(set(data.length_tokens))
    _look.length_axis(axes, lengths, room=0.27)
    axes.set_ylim(0, data.value.max() * 1.06)
    axes.set_ylabel(f"K,V cache ({data.unit.iloc[0]})")
    full, kept = data[(data.source == LIVE) & (data.length_tokens == lengths[-1])].value
    span = lengths[-1] / lengths[0] if len(lengths) > 1 else 2.0
    x = lengths[-1] * span**0.07
    axes.annotate("", (x, kept), (x, full), arrowprops={"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0, "lw": 0.9})
    axes.text(x * span**0.025, (full + kept) / 2, f"{100 * (1 - kept / full):.1f} %\nsaved", va="center", fontsize=8)


def draw_saved(axes: Axes, data: pd.DataFrame) -> None:
    """The share saved by length."""
    curves(axes, data)
    _look.length_axis(axes, data.length_tokens)
    axes.set_ylim(0, data.value.max() * 1.25)
    axes.set_ylabel("K,V cache saved (% of MHA)")
