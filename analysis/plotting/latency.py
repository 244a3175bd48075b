"""Latency (Figures 12a and 12b): times of the whole model, and speedups beside the theoretical ones."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.plotting import page, paper, style
from analysis.plotting.paper import PaperNumber
from analysis.results.benchmarks import LATENCY, QUARTILES, describe_rounds, times
from analysis.results.runs import Results, Run, base_name

MEASURED, LIMIT, PAPER, CONTROL = "measured", "limit", "paper", "control"
PRODUCTS = "products"  # kernel: the method's own matrix products
MOST_COUNTS = 3  # cluster counts drawn of the attention alone
COLUMNS = [
    "panel", "series", "source", "implementation", "k", "length_tokens", "value", "unit", "p25", "p75",
    "best_baseline", "run",
]  # fmt: skip
WHISKERS: dict[str, Any] = {
    "capsize": 2.5, "elinewidth": 0.9, "capthick": 0.9, "markerfacecolor": "none", "markeredgewidth": 1.2,
}  # fmt: skip


def draw_latency(results: Results, phase: str, title: str, note: str, claim: str) -> tuple[Figure, pd.DataFrame]:
    """Draw times on the left and speedups on the right, of ``prefill`` or ``decode``.

    The paper's claim, a speedup named by its id, is drawn only if the run is of its model.
    """
    run = results.newest(LATENCY, lambda run: set(times(run, phase).baseline) == {True, False})
    data = plot_data(run, phase, paper.number(claim))
    has_control = CONTROL in set(data.source)
    figure = page.of_run(run, f"{title} against sequence length")
    left, right = figure.subplots(1, 2)
    draw_times(left, data[data.panel == "time"], title)
    draw_speedups(right, data[data.panel == "speedup"], phase)
    rounds = describe_rounds(times(run, phase).rounds.min())
    static = " and on StaticCache" if "static_cache" in set(data.implementation) else ""
    caches = (
        f"MHA on the growing cache{static} by the faster kernel, and by the method's own products; eager and SDPA on "
        "the stock cache. k = H, the control: the method with every head a cluster"
        if has_control
        else "An earlier version's run: MHA on the stock cache alone, and no control k = H"
    )
    page.finish(figure, run, f"Medians of {rounds}, interleaved; whiskers are quartiles; {note}. {caches}.")
    return figure, data


def plot_data(run: Run, phase: str, claim: PaperNumber) -> pd.DataFrame:
    """Return a row for each point: panel, series, source, implementation, k, length_tokens, value, unit, quartiles."""
    model, attention = (
        times(run, phase, part, control=True)
        .sort_values("length", ignore_index=True)
        .rename(columns={"length": "length_tokens"})
        .assign(run=run.result["run_id"])
        for part in ("model", "attention")
    )
    # Times of the whole model: of every cache the fastest kernel, of the method and of the control.
    model = fastest_kernels(model)
    scale, unit = (1e3, "s") if model.ms.max() >= 1e4 else (1.0, "ms")
    quartiles = {"p25": model.ms_p25 / scale, "p75": model.ms_p75 / scale}
    names = model.implementation.map(style.label)
    parts = [model.assign(panel="time", series=names, source=MEASURED, value=model.ms / scale, unit=unit, **quartiles)]

    # The method's speedup, and the theoretical one, which is unknown in decoding of a method without clusters.
    method = model[model.role == "method"]
    bests = list(map(style.label, method.best_baseline.unique()))
    best = bests[0] if len(bests) == 1 else f"the best of {', '.join(bests)}"
    name = f"{style.label(method.implementation.iloc[0])} against {best}"
    parts.append(speedups(method, name, "theoretical speedup").dropna(subset="value"))

    # The control, whose speedup is 1 unless the method and the baseline differ in more than clustering.
    control = model[model.role == CONTROL]
    parts.append(with_quartiles(control, style.label(CONTROL), CONTROL))

    # The same of the attention alone, for a few cluster counts.
    attention = attention[attention.role == "method"]
    for k in some_counts(attention, run.result["heads"]):
        name = f"attention alone, k = {k}"
        parts.append(speedups(attention[attention.k == k], name, name))

    if base_name(run.model) == claim.model:  # the paper makes no claim about other models
        name = f"paper: {claim.value:g}{style.TIMES} ({style.label(claim.model)}, V100)"
        point = {"panel": "speedup", "series": name, "source": PAPER, "length_tokens": int(claim.options["length"])}
        parts.append(pd.DataFrame([point | {"value": claim.value, "unit": "x"}]))
    return pd.concat(parts, ignore_index=True)[COLUMNS].astype({"k": "Int64"})


def speedups(rows: pd.DataFrame, measured: str, theoretical: str) -> pd.DataFrame:
    """Return the measured and the theoretical speedup of each row, one after the other, as series of these names."""
    first = with_quartiles(rows, measured, MEASURED)
    second = rows.assign(panel="speedup", unit="x", series=theoretical, source=LIMIT, value=rows.limit)
    return pd.concat([first, second]).sort_index(kind="stable")


def with_quartiles(rows: pd.DataFrame, series: str, source: str) -> pd.DataFrame:
    """Return the speedup of each row with the quartiles of its rounds, as a series of this name."""
    low, high = (rows[name].astype(float) for name in QUARTILES)
    return rows.assign(panel="speedup", unit="x", series=series, source=source, value=rows.speedup, p25=low, p75=high)


def fastest_kernels(model: pd.DataFrame) -> pd.DataFrame:
    """Return, of the baselines on one cache (and of those by the method's products), the fastest at each length.

    Baselines on the stock cache remain, whose kernels are drawn one by one.
    """
    groups = model.implementation.copy()
    for part, group in (("_growing", "growing_cache"), ("_static", "static_cache"), (PRODUCTS, PRODUCTS)):
        groups = groups.mask((model.role == "baseline") & model.implementation.str.contains(part), group)
    fastest = model.assign(group=groups).sort_values("ms", kind="stable").drop_duplicates(["group", "length_tokens"])
    return fastest.sort_index().drop(columns="implementation").rename(columns={"group": "implementation"})


def some_counts(attention: pd.DataFrame, heads: int) -> list[int]:
    """Return the smallest, the middle and the largest cluster count below the number of heads."""
    counts = sorted({int(k) for k in attention.k.dropna() if k < heads})
    return counts if len(counts) <= MOST_COUNTS else [counts[0], counts[len(counts) // 2], counts[-1]]


def draw_times(axes: Axes, data: pd.DataFrame, title: str) -> None:
    """Draw every baseline and the method, with quartiles as whiskers."""
    for name, points in data.groupby("implementation", sort=False):
        line = WHISKERS | style.look(str(name)) | {"label": points.series.iloc[0]}
        axes.errorbar(points.length_tokens, points.value, whiskers(points), **line)
    page.length_axis(axes, data.length_tokens)
    axes.set_ylabel(f"{title.lower()} ({data.unit.iloc[0]})")
    if data.value.max() > 8 * data.value.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, data.p75.max() * 1.08)


def draw_with_quartiles(axes: Axes, points: pd.DataFrame, line: dict[str, Any]) -> None:
    """Draw a line, and whiskers where there are quartiles."""
    axes.plot(points.length_tokens, points.value, **line)
    points = points.dropna(subset=["p25", "p75"])
    bars = {name: WHISKERS[name] for name in ("capsize", "elinewidth", "capthick")}
    axes.errorbar(points.length_tokens, points.value, whiskers(points), fmt="none", ecolor=line["color"], **bars)


def whiskers(points: pd.DataFrame) -> list[pd.Series]:
    """Return the distances to the quartiles."""
    return [(points.value - points.p25).clip(lower=0), (points.p75 - points.value).clip(lower=0)]


def draw_speedups(axes: Axes, data: pd.DataFrame, phase: str) -> None:
    """Draw the model's speedup and the attention's, each beside the theoretical one, and the paper's claim."""
    extras = iter(style.EXTRA)
    for series, points in data.groupby("series", sort=False):
        measured, limit = points[points.source == MEASURED], points[points.source == LIMIT]
        if (points.source == CONTROL).all():
            draw_with_quartiles(axes, points, style.look(CONTROL) | {"label": series, "linewidth": 1})
        elif (points.source == PAPER).all():
            axes.plot(points.length_tokens, points.value, "*", color=style.INK, markersize=10, label=series, zorder=5)
        elif measured.empty:
            unit = "operations" if phase == "prefill" else "bytes read"
            line = {"color": style.INK, "linewidth": 1, "label": f"{series} ({unit})"}
            line["marker"] = "_" if len(limit) == 1 else ""  # a single length has no line
            axes.plot(limit.length_tokens, limit.value, "--", markersize=10, **line)
        elif limit.empty:
            line = style.look(measured.implementation.iloc[0]) | {"label": series, "zorder": 4}
            draw_with_quartiles(axes, measured, line)
            last = measured.iloc[-1]
            words, end = f"{last.value:.2f}{style.TIMES}", (last.length_tokens, last.value)
            axes.annotate(words, end, (6, 0), textcoords="offset points", va="center")
        else:
            line = next(extras) | {"linewidth": 0.8, "markersize": 4, "markerfacecolor": "none"}
            axes.plot(measured.length_tokens, measured.value, label=f"{series} (dotted: theoretical)", **line)
            axes.plot(limit.length_tokens, limit.value, ":", color=line["color"], linewidth=0.9)
    page.length_axis(axes, data.length_tokens, room=0.19)
    page.ratio_axis(axes, data.value)
    axes.set_ylabel("speedup over best baseline")
