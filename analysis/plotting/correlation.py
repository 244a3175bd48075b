"""Correlation of heads (Figures 2b, 6 and 7): heat maps with heads in clustered order and clusters framed."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from analysis.plotting import maps, page, style
from analysis.results.profiles import Profile, best_profile
from analysis.results.runs import Results

NORM = Normalize(0, 1)
COLOURS = "viridis"
FRAME = "#ffffff"
NOTES = (
    "Heads by cluster, the largest first (membership over all samples; white frames: clusters of two heads and more). "
    f"Negative correlations have the colour of 0. {page.COUNTED}"
)


def show(axes: Axes, correlation: NDArray[Any], groups: Sequence[NDArray[Any]]) -> None:
    """Draw a heat map in the order of the groups; frame each of two heads and more."""
    order = np.concatenate(groups)
    colours = colormaps[COLOURS].with_extremes(bad="#bbbbbb")  # a head without variation has no correlation
    axes.imshow(correlation[np.ix_(order, order)], norm=NORM, cmap=colours, aspect="equal", interpolation="nearest")
    page.no_grid(axes)
    # Cells are centred at integers, so the first frame starts half a cell before 0.
    start = -0.5
    for size in map(len, groups):
        if size > 1:
            axes.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor=FRAME, linewidth=1.1))
        start += size


def bar(figure: FigureBase, **where: Any) -> Colorbar:
    """Add the colour bar of heat maps."""
    mappable = ScalarMappable(NORM, COLOURS)
    return page.color_bar(figure, mappable, "correlation of attention (Pearson)", extend="min", **where)


def within_and_between(correlation: NDArray[Any], assignment: NDArray[Any]) -> tuple[float, float]:
    """Return the mean correlation of two heads of the same cluster, and of different ones; NaN without such two."""
    same = assignment[:, None] == assignment
    pairs = ~np.eye(len(same), dtype=bool)
    return _mean(correlation[same & pairs]), _mean(correlation[~same])


def between_heads(correlation: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean correlation of two different heads, ``[L, H, H] -> [L]``."""
    pairs = ~np.eye(correlation.shape[-1], dtype=bool)
    return np.array([_mean(layer[pairs]) for layer in correlation])


def _mean(values: NDArray[Any]) -> float:
    values = values[~np.isnan(values)]  # a head whose attention is the same everywhere has no correlation
    return float(values.mean(dtype=np.float64)) if values.size else float("nan")


def plot_data(profile: Profile, correlation: NDArray[Any], layers: Sequence[int], panel: str) -> pd.DataFrame:
    """Return a row for each cell of some layers' heat maps as drawn: top to bottom, left to right."""
    parts = []
    for layer in layers:
        order = np.concatenate(profile.order(layer))
        row, column = (order[place.ravel()] for place in np.indices((len(order), len(order))))
        assignment = profile["assignment"][layer]
        parts.append(
            page.rows(
                profile,
                panel=panel, layer=layer, head=row, other_head=column, cluster=assignment[row],
                other_cluster=assignment[column], correlation=correlation[layer][row, column],
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def notes(clusters: int | None) -> str:
    """Return how to read the heat maps, with a requested number of clusters."""
    return f"{NOTES} {page.requested(clusters)}".strip()


def draw_layers(
    results: Results, title: str, one_sample: bool, clusters: int | None = None
) -> tuple[Figure, pd.DataFrame]:
    """Draw heat maps of a few layers, of one sample or the mean; below, the mean correlation of two heads by layer.

    ``clusters`` replaces the chosen numbers of clusters.
    """
    profile = best_profile(results).at(clusters)
    mean_label = f"mean over {profile.samples:,} samples"
    correlation = profile.sample_correlation if one_sample else profile["correlation"]
    curves = {"one sample": between_heads(correlation)} if one_sample else {}
    curves[mean_label] = between_heads(profile["correlation"])

    figure = page.of_run(profile.run, title, 8.9)
    halves = figure.add_gridspec(2, 1, height_ratios=(6.7, 1.75))
    upper, lower = (figure.add_subfigure(half) for half in halves)
    layers = sorted({round(place) for place in np.linspace(0, profile.layers - 1, 4)})
    draw_heat_maps(upper, profile, correlation, layers)
    data = [plot_data(profile, correlation, layers, "heat map")]

    # The depth panel: one sample and the mean, or the mean alone.
    axes = lower.subplots()
    looks = ({"color": style.LOOKS["chai"]["color"], "marker": "o"}, {"color": style.GREY, "linestyle": "--"})
    depth = range(profile.layers)
    for (name, values), line in zip(curves.items(), looks, strict=False):
        axes.plot(depth, values, label=name, markersize=3, **line)
        data.append(page.rows(profile, panel="depth", series=name, layer=depth, correlation=values))
    axes.set(xlabel="layer", ylabel="mean correlation")
    words = "" if one_sample else f": {mean_label}"  # otherwise in the legend
    axes.set_title(f"({ascii_lowercase[len(layers)]}) all pairs of two heads, by layer{words}")
    axes.xaxis.set_major_locator(page.whole_numbers())
    axes.set_ylim(min(0.0, *(np.nanmin(values, initial=0) for values in curves.values())), 1)
    if one_sample:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    page.finish_profiles(figure, [profile], notes(clusters))
    return figure, pd.concat(data, ignore_index=True)


def draw_heat_maps(figure: FigureBase, profile: Profile, correlation: NDArray[Any], layers: Sequence[int]) -> None:
    """Draw heat maps of up to four layers, with heads labelled and one colour bar."""
    grid = list(figure.subplots(2, 2).flat)
    inches = 2.62  # of a heat map's side
    for letter, layer, axes in zip(ascii_lowercase, layers, grid, strict=False):
        groups = profile.order(layer)
        show(axes, correlation[layer], groups)
        for along in "yx":
            maps.label_heads(axes, np.concatenate(groups), inches, along)
        axes.set_title(f"({letter}) layer {layer}: {style.plural(len(groups), 'cluster')}")
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    bar(figure, ax=grid, fraction=0.03, pad=0.02, aspect=40)
