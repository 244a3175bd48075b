"""KV cache against sequence length: bytes of the live tensors, bytes by arithmetic, and the paper's claim."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plotting import page, paper, style
from analysis.results.benchmarks import MEMORY
from analysis.results.runs import Results, Run, base_name

NAME = "KV cache against sequence length"
TITLE = f"{NAME} (paper, Figure 11)"
QUERY = MEMORY
CLAIM = "kv-saved"  # in results/paper/claims.csv
LIVE, FORMULA, PAPER = "live tensors", "arithmetic", "paper"


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw bytes on the left, the share saved on the right."""
    run = results.newest(MEMORY, usable=lambda run: {"mha"} < {"mha", run.method} <= set(run.table.method))
    data = plot_data(run)
    figure = page.of_run(run, NAME)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    draw_cache(left, data[data.panel == "cache"])
    saved = data[data.panel == "saved"]
    curves(right, saved)
    page.length_axis(right, saved.length_tokens)
    right.set(ylim=(0, saved.value.max() * 1.25), ylabel="KV cache saved (% of MHA)")
    page.finish(figure, run, "Keys and values, summed from the live tensors; 1 GB = 1000 MB = 10⁹ bytes.")
    return figure, data


def plot_data(run: Run) -> pd.DataFrame:
    """Return a row for each point: panel, method, source, length_tokens, value, unit, run."""
    sizes = run.table.pivot(index="length", columns="method", values=["cache_bytes", "formula_bytes"])
    scale, unit = (1e9, "GB") if run.table.cache_bytes.max() >= 1e9 else (1e6, "MB")
    parts = []

    def add(panel: str, method: str, source: str, values: pd.Series, unit: str) -> None:
        points = {"panel": panel, "method": method, "source": source, "length_tokens": values.index, "value": values}
        run_id = None if source == PAPER else run.result["run_id"]
        parts.append(pd.DataFrame(points | {"unit": unit, "run": run_id}))

    for column, source in (("cache_bytes", LIVE), ("formula_bytes", FORMULA)):
        for method in ("mha", run.method):
            add("cache", method, source, sizes[column][method] / scale, unit)
        add("saved", run.method, source, 100 * (1 - sizes[column][run.method] / sizes[column]["mha"]), "%")
    claim = paper.number(CLAIM)
    if base_name(run.model) == claim.model:  # the paper makes no claim about other models
        full = sizes["cache_bytes"]["mha"]
        add("cache", "chai", PAPER, full * (1 - claim.value / 100) / scale, unit)
        add("saved", "chai", PAPER, 0 * full + claim.value, "%")
    return pd.concat(parts, ignore_index=True)


def curves(axes: Axes, data: pd.DataFrame) -> None:
    """Draw live tensors with markers, arithmetic as crosses on top, and the paper's claim dotted."""
    claim = paper.number(CLAIM)
    for (source, name), points in data.groupby(["source", "method"], sort=False):
        method = str(name)
        if source == LIVE:
            line = style.look(method) | {"label": f"{style.label(method)}, {LIVE}"}
        elif source == FORMULA:
            # One entry in the legend stands for the arithmetic of all methods.
            first = method == data.method.iloc[0]
            line = {"color": style.INK, "linestyle": "none", "marker": "+", "markersize": 7, "markeredgewidth": 0.7}
            line |= {"zorder": 4, "label": FORMULA if first else None}
        else:
            line = style.PAPER | {"label": f"paper's claim: {claim.value:g} % saved ({style.label(claim.model)})"}
        axes.plot(points.length_tokens, points.value, **line)


def draw_cache(axes: Axes, data: pd.DataFrame) -> None:
    """Draw the size by length, with the method's saving at the longest."""
    curves(axes, data)
    span = page.length_axis(axes, data.length_tokens, room=0.27)
    axes.set(ylim=(0, data.value.max() * 1.06), ylabel=f"KV cache ({data.unit.iloc[0]})")
    # A double arrow from the method's size to that of MHA.
    longest = data.length_tokens.max()
    full, pruned = data[(data.source == LIVE) & (data.length_tokens == longest)].value
    x = longest * span**0.07
    axes.annotate("", (x, pruned), (x, full), arrowprops={"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0, "lw": 0.9})
    words = f"{100 * (1 - pruned / full):.1f} %\nsaved"
    axes.text(x * span**0.025, (full + pruned) / 2, words, va="center", fontsize=8)
