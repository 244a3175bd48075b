"""Correlation of heads, as Figures 2b, 6 and 7 show it: heads in clustered order, clusters framed."""

from __future__ import annotations

from collections.abc import Sequence
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

from analysis import profiles
from analysis.figures import _look, _maps, _profile
from analysis.profiles import Profile
from analysis.saved import Results

NORM = Normalize(0, 1)
COLOURS = "viridis"
FRAME = "#ffffff"
NOTES = (
    "Heads by cluster, the largest first (membership over all samples; white frames: clusters of two heads and more). "
    f"Negative correlations have the colour of 0. {_profile.COUNTED}"
)


def chosen_layers(layers: int) -> list[int]:
    """The first, two between and the last."""
    return sorted({round(place) for place in np.linspace(0, layers - 1, 4)})


def show(axes: Axes, correlation: NDArray[Any], groups: Sequence[NDArray[Any]]) -> None:
    """One heat map in the order of the groups, each of two heads and more framed."""
    order = np.concatenate(groups)
    colours = colormaps[COLOURS].with_extremes(bad="#bbbbbb")  # a head without variation has no correlation
    axes.imshow(correlation[np.ix_(order, order)], norm=NORM, cmap=colours, aspect="equal", interpolation="nearest")
    _profile.no_grid(axes)
    start = -0.5
    for size in map(len, groups):
        if size > 1:
            axes.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor=FRAME, linewidth=1.1))
        start += size


def bar(figure: FigureBase, **where: Any) -> Colorbar:
    """The colour bar of heat maps; where it goes, as for :meth:`matplotlib.figure.Figure.colorbar`."""
    drawn = figure.colorbar(ScalarMappable(NORM, COLOURS), extend="min", **where)
    drawn.set_label("correlation of attention (Pearson)")
    drawn.ax.grid(False)
    drawn.outline.set_linewidth(0.5)
    return drawn


def within_and_between(correlation: NDArray[Any], assignment: NDArray[Any]) -> tuple[float, float]:
    """Mean correlation of two heads of the same cluster, and of different ones; NaN where there are no such two."""
    same = assignment[:, None] == assignment
    pairs = ~np.eye(len(same), dtype=bool)
    return _mean(correlation[same & pairs]), _mean(correlation[~same])


def between_heads(correlation: NDArray[Any]) -> NDArray[np.float64]:
    """Mean correlation of two different heads in each layer; [layers, heads, heads] in, [layers] out."""
    pairs = ~np.eye(correlation.shape[-1], dtype=bool)
    return np.array([_mean(layer[pairs]) for layer in correlation])


def _mean(values: NDArray[Any]) -> float:
    values = values[~np.isnan(values)]  # a head whose attention is the same everywhere has no correlation
    return float(values.mean(dtype=np.float64)) if values.size else float("nan")


def plotted(profile: Profile, correlation: NDArray[Any], layers: Sequence[int], panel: str) -> pd.DataFrame:
    """One row for each cell of the heat maps of some layers, as they are drawn: top to bottom, left to right."""
    parts = []
    for layer in layers:
        order = np.concatenate(profile.order(layer))
        row, column = (place.ravel() for place in np.indices((len(order), len(order))))
        assignment = profile["assignment"][layer]
        parts.append(
            _profile.rows(
                profile,
                panel=panel, layer=layer, head=order[row], other_head=order[column], cluster=assignment[order[row]],
                other_cluster=assignment[order[column]], correlation=correlation[layer][order[row], order[column]],
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def draw_layers(results: Results, title: str, sample: int | None) -> tuple[Figure, pd.DataFrame]:
    """Heat maps of a few layers and, below, how the correlation of two heads changes with depth.

    Args:
        results: where the profile is looked for.
        title: the heading, with the paper's number.
        sample: a kept one; ``None``: the mean over all samples.

    Raises:
        MissingRun: there is no profile.
    """
    profile = profiles.best(results)
    mean = profile["correlation"]
    correlation = mean if sample is None else profile["sample_correlation"][sample]
    layers = chosen_layers(profile.layers)
    samples = f"{profile.about['corpus']['samples']:,} samples"
    whole = f"mean over {samples}" if sample is None else "one sample"
    height = 8.9
    figure = _profile.page(title, profile, height)
    halves = figure.add_gridspec(2, 1, height_ratios=(6.7, 1.75))
    upper, lower = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    grid = list(upper.subplots(2, 2).flat)
    inches = 2.62  # of a heat map's side
    for letter, layer, axes in zip(_profile.LETTERS, layers, grid, strict=False):
        groups = profile.order(layer)
        show(axes, correlation[layer], groups)
        order = [int(head) for head in np.concatenate(groups)]
        _maps.label_heads(axes, order, inches)
        _maps.label_heads(axes, order, inches, along="x")
        axes.set_title(f"({letter}) layer {layer}: {len(groups)} cluster{'s' if len(groups) != 1 else ''}")
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    bar(upper, ax=grid, fraction=0.03, pad=0.02, aspect=40)
    data = [plotted(profile, correlation, layers, "heat map")]
    axes = lower.subplots()
    curves = {whole: between_heads(correlation)}
    if sample is not None:
        curves[f"mean over {samples}"] = between_heads(mean)
    styles = ({"color": _look.LOOKS["chai"]["color"], "marker": "o"}, {"color": _look.GREY, "linestyle": "--"})
    for (name, values), style in zip(curves.items(), styles, strict=False):
        axes.plot(range(profile.layers), values, label=name, markersize=3, **style)
        data.append(_profile.rows(profile, panel="depth", series=name, layer=range(profile.layers), correlation=values))
    axes.set_xlabel("layer")
    axes.set_ylabel("mean correlation")
    where = f": {whole}" if sample is None else ""  # else the legend tells
    axes.set_title(f"({_profile.LETTERS[len(layers)]}) all pairs of two heads, by layer{where}")
    axes.xaxis.set_major_locator(_profile.whole_numbers())
    axes.set_ylim(min(0.0, *(np.nanmin(values, initial=0) for values in curves.values())), 1)
    if sample is not None:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _profile.sign(figure, [profile], NOTES)
    return figure, pd.concat(data, ignore_index=True)
