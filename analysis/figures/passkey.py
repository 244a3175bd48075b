"""Keys found in long texts: a heat map of length and depth for each method."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis.plotting import page
from analysis.plotting.style import clusters, label
from analysis.results.passkey import PASSKEY, PasskeyRun, passkey_runs
from analysis.results.runs import Results

TITLE = "Keys found in long texts, by length and depth"
QUERY = PASSKEY
COLUMNS = 3  # panels beside each other
TITLE_WIDTH = 36  # characters
COLOURS = colormaps["viridis"].with_extremes(bad="#e4e4e4")
NORM = Normalize(0, 100)


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw one panel for each run, of the model with the most runs."""
    runs = passkey_runs(results)
    columns = min(COLUMNS, len(runs))
    rows = -(-len(runs) // columns)
    figure = page.new(f"{TITLE}: {label(runs[0].run.model)}", 0.8 + 2.45 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    several = len({run.task for run in runs}) > 1
    for place, axes in enumerate(grid.flat):
        if place >= len(runs):
            axes.set_axis_off()
            continue
        draw_run(axes, runs[place])
        axes.set_title(panel_title(runs[place], runs, name_task=several), fontsize=7.5)
        if place % columns == 0:
            axes.set_ylabel("depth of the key", fontsize=7.5)
        if place + columns >= len(runs):
            axes.set_xlabel("prompt (tokens); mean of its depths", fontsize=7.5)
    where = {"ax": list(grid.flat), "aspect": 28, "fraction": 0.03, "pad": 0.01}
    page.color_bar(figure, ScalarMappable(NORM, COLOURS), "keys found (%)", **where)
    newest = max((one.run for one in runs), key=lambda run: run.updated)
    page.footer(figure, [*page.wrap(notes(runs)), page.provenance(newest, f"newest of {len(runs)} runs")])
    return figure, plot_data(runs)


def draw_run(axes: Axes, one: PasskeyRun) -> None:
    """Draw the cells of one run, with their values in percent."""
    table = 100 * one.cells.pivot(index="depth", columns="length", values="score")
    values = table.to_numpy(dtype=float)
    axes.imshow(np.ma.masked_invalid(values), cmap=COLOURS, norm=NORM, aspect="auto", interpolation="nearest")
    page.no_grid(axes)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value < 60 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7.5)
    means = 100 * one.by_length()
    axes.set_xticks(range(len(table.columns)), [f"{length:,}\n{means[length]:.0f} %" for length in table.columns])
    axes.set_yticks(range(len(table.index)), [f"{depth:g}" for depth in table.index])
    axes.tick_params(labelsize=7)


def panel_title(one: PasskeyRun, runs: list[PasskeyRun], *, name_task: bool) -> str:
    """Return the method with its settings, its clusters, the share of all keys that it finds, and what it saves."""
    words = ", ".join([label(one.run.method), *one.differing(runs)])
    lines = textwrap.wrap(f"{one.task}: {words}" if name_task else words, TITLE_WIDTH)
    if one.run.method != "mha":
        lines.append(clusters(one.heads, most=1))
    return "\n".join([*lines, f"{100 * one.score:.0f} % found, {100 * one.saved:.1f} % of KV saved"])


def notes(runs: list[PasskeyRun]) -> str:
    """Return what a cell is, and how sure its value."""
    counts = sorted({int(count) for one in runs for count in one.cells.n})
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    error = 50 / counts[0] ** 0.5
    return (
        "A cell: prompts of one length with the key at one depth (0: start of the text, 1: its end); share of them "
        f"whose generated answer is exactly the key. n = {items} a cell: standard error up to {error:.0f} points."
    )


def plot_data(runs: list[PasskeyRun]) -> pd.DataFrame:
    """Return a row for each cell of each run."""
    frames = []
    for one in runs:
        head = {"run": str(one.run.folder), "model": one.run.model, "task": one.task, "method": one.run.method}
        frames.append(one.cells.assign(**head, heads=sum(one.heads) / len(one.heads), kv_saved=one.saved))
    names = ["run", "model", "task", "method", "heads", "kv_saved", "length", "depth", "n", "score"]
    return pd.concat(frames, ignore_index=True)[names]
