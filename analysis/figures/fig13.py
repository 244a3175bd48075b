"""Sizes of clusters in one layer, and the largest clusters of every layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plotting import page, paper, style
from analysis.results.profiles import PROFILE, Profile, best_profile
from analysis.results.runs import Results
from analysis.tables.settings import defaults

TITLE = "Sizes of clusters (paper, Figure 13)"
QUERY = PROFILE
CLAIM = "cluster-skew"  # in results/paper/claims.csv, with the paper's layer
LARGEST, BOTH = "largest cluster", "two largest clusters"
NOTES = (
    "Clusters found in each sample by itself, ordered by size; mean over samples, whiskers: their standard "
    f"deviation. {page.COUNTED}"
)


def draw(results: Results, clusters: int | None = None) -> tuple[Figure, pd.DataFrame]:
    """Draw bars of one layer on the left, all layers on the right; ``clusters`` replaces the chosen numbers."""
    profile = best_profile(results).at(clusters)
    layer = the_layer(profile.layers)
    data = plot_data(profile, layer)
    figure = page.of_run(profile.run, TITLE, 4.1)
    left, right = figure.subplots(1, 2)
    draw_sizes(left, data[data.panel == "sizes"], profile, layer)
    draw_shares(right, data[data.panel == "shares"], profile, layer)
    page.finish_profiles(figure, [profile], f"{NOTES} {page.requested(clusters)}".strip())
    return figure, data


def the_layer(layers: int) -> int:
    """Return the paper's layer, or the layer at the same relative depth in a model without it."""
    claim = paper.number(CLAIM)
    layer = int(claim.options["layer"])
    depth = int(defaults(f"model/{claim.model}")["architecture"]["num_hidden_layers"])
    return layer if layers > layer else min(round(layers * layer / depth), layers - 1)


def draw_sizes(axes: Axes, data: pd.DataFrame, profile: Profile, layer: int) -> None:
    """Draw a bar for each cluster of the layer."""
    k, heads = profile.clusters[layer], profile.heads
    whiskers = {"fmt": "none", "ecolor": style.INK, "elinewidth": 0.9, "capsize": min(2.5, 30 / k)}
    axes.bar(data.place, data.heads, color=style.LOOKS["mha"]["color"], width=0.72, zorder=2)
    axes.errorbar(data.place, data.heads, data.sd, zorder=3, **whiskers)
    axes.axhline(heads / k, color=style.INK, linestyle="--", linewidth=1, label="clusters of equal size")
    axes.set(xlabel="cluster, by size", ylabel="heads in the cluster")
    axes.set_ylim(0, min(1.12 * max((data.heads + data.sd).max(), heads / k), heads * 1.12))
    axes.set_title(f"(a) layer {layer}: {style.plural(k, 'cluster')} of {heads} heads")
    page.count_ticks(axes, k)
    page.legend_below(axes)


def draw_shares(axes: Axes, data: pd.DataFrame, profile: Profile, layer: int) -> None:
    """Draw the share of heads in the largest clusters by layer, with a line at the layer of the bars."""
    size = 3.5 if profile.layers <= 40 else 2.5
    for series, name in ((LARGEST, "chai"), (BOTH, "mha")):
        points, look = data[data.series == series], style.look(name)
        line = {"color": look["color"], "marker": look["marker"], "markersize": size}
        axes.plot(points.layer, points.share, label=series, **line)
    axes.axvline(layer, color=style.GREY, linewidth=0.8, linestyle=":", label=f"layer {layer}")
    axes.set(xlabel="layer", ylabel="share of all heads (%)", ylim=(0, 103))
    axes.set_title("(b) all layers, each with its number of clusters")
    axes.xaxis.set_major_locator(page.whole_numbers())
    page.legend_below(axes)


def plot_data(profile: Profile, layer: int) -> pd.DataFrame:
    """Return a row for each cluster of the layer, and for each layer and series."""
    k, counts = profile.clusters[layer], profile["clusters"]
    sizes = page.rows(
        profile,
        panel="sizes", layer=layer, clusters=k, place=np.arange(1, k + 1),
        heads=profile["cluster_sizes"][layer, k - 1, :k], sd=profile["cluster_sizes_sd"][layer, k - 1, :k],
    )  # fmt: skip
    layers = np.arange(profile.layers)
    sizes_at_k = profile["cluster_sizes"][layers, counts - 1]
    shares = [
        page.rows(
            profile, panel="shares", layer=layers, clusters=counts, series=series,
            share=100 * sizes_at_k[:, :many].sum(axis=1) / profile.heads,
        )
        for series, many in ((LARGEST, 1), (BOTH, 2))
    ]  # fmt: skip
    return pd.concat([sizes, *shares], ignore_index=True)
