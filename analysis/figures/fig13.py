"""How heads spread over clusters: the sizes in one layer, and the largest clusters of every layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import profiles
from analysis.figures import _look, _profile
from analysis.profiles import Profile
from analysis.saved import Results

TITLE = "Sizes of clusters (paper, Figure 13)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND
LAYER, OF = 18, 32  # the paper's layer, of LLaMA-7B's
LARGEST, BOTH = "largest cluster", "two largest clusters"


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Bars of one layer on the left, all layers on the right."""
    profile = profiles.best(results)
    layer = the_layer(profile.layers)
    k = profile.clusters[layer]
    data = plotted(profile, layer)
    figure = _profile.page(TITLE, profile, 4.1)
    left, right = figure.subplots(1, 2)
    bars = data[data.panel == "sizes"]
    left.bar(bars.place, bars.heads, color=_look.LOOKS["mha"]["color"], width=0.72, zorder=2)
    left.errorbar(
        bars.place,
        bars.heads,
        bars.sd,
        fmt="none",
        ecolor=_look.INK,
        elinewidth=0.9,
        capsize=min(2.5, 30 / k),
        zorder=3,
    )
    left.axhline(profile.heads / k, color=_look.INK, linestyle="--", linewidth=1, label="clusters of equal size")
    left.set_xlabel("cluster, by size")
    left.set_ylabel("heads in the cluster")
    left.set_ylim(0, min(max((bars.heads + bars.sd).max() * 1.12, profile.heads / k * 1.12), profile.heads * 1.12))
    _profile.count_ticks(left, k)
    left.set_title(f"(a) layer {layer}: {k} cluster{'s' if k != 1 else ''} of {profile.heads} heads")
    _look.legend_below(left)
    for series, name in ((LARGEST, "chai"), (BOTH, "mha")):
        points = data[data.series == series]
        right.plot(
            points.layer,
            points.share,
            label=series,
            markersize=3.5 if profile.layers <= 40 else 2.5,
            color=_look.look(name)["color"],
            marker=_look.look(name)["marker"],
        )
    right.axvline(layer, color=_look.GREY, linewidth=0.8, linestyle=":", label=f"layer {layer}")
    right.set_xlabel("layer")
    right.set_ylabel("share of all heads (%)")
    right.set_ylim(0, 103)
    right.xaxis.set_major_locator(_profile.whole_numbers())
    right.set_title("(b) all layers, each with its number of clusters")
    _look.legend_below(right)
    notes = (
        "Clusters found in each sample by itself, ordered by size; mean over samples, whiskers: their standard "
        f"deviation. {_profile.COUNTED}"
    )
    _profile.sign(figure, [profile], notes)
    return figure, data


def the_layer(layers: int) -> int:
    """Layer 18 as in the paper, or the one as deep in a model without it."""
    return LAYER if layers > LAYER else min(round(layers * LAYER / OF), layers - 1)


def plotted(profile: Profile, layer: int) -> pd.DataFrame:
    """One row for each cluster of the layer, and for each layer and series."""
    k = profile.clusters[layer]
    sizes = _profile.rows(
        profile,
        panel="sizes", layer=layer, clusters=k, place=np.arange(1, k + 1),
        heads=profile["cluster_sizes"][layer, k - 1, :k], sd=profile["cluster_sizes_sd"][layer, k - 1, :k],
    )  # fmt: skip
    chosen = profile["cluster_sizes"][np.arange(profile.layers), profile["clusters"] - 1]
    shares = [
        _profile.rows(
            profile,
            panel="shares", layer=np.arange(profile.layers), clusters=profile["clusters"], series=series,
            share=100 * chosen[:, :many].sum(axis=1) / profile.heads,
        )
        for series, many in ((LARGEST, 1), (BOTH, 2))
    ]  # fmt: skip
    return pd.concat([sizes, *shares], ignore_index=True)
