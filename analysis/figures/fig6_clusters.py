"""Correlation of heads within clusters and between them, at every number of clusters, for each layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plotting import page, style
from analysis.results.profiles import PROFILE, Profile, best_profile
from analysis.results.runs import Results

TITLE = "Correlation within and between clusters, at every number of clusters"
QUERY = PROFILE
SERIES = {"within": "two heads of a cluster", "between": "two heads of different clusters"}
DOT = {"linestyle": "none", "marker": "o", "markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.5}


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw a curve for each layer: heads of a cluster on the left, of different clusters on the right."""
    profile = best_profile(results)
    profile.need(*SERIES)
    data = plot_data(profile)
    figure = page.of_run(profile.run, TITLE, 3.6)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    shades, width = page.depth(profile.layers), 0.8 if profile.layers <= 40 else 0.5
    for axes, (series, title) in zip(panels, SERIES.items(), strict=True):
        for layer in range(profile.layers):
            points = data[(data.layer == layer) & (data.series == series)]
            shade, chosen = shades.to_rgba(layer), points[points.chosen]
            axes.plot(points.k, points.correlation, color=shade, linewidth=width)
            axes.plot(chosen.k, chosen.correlation, color=shade, zorder=3, **DOT)
        axes.set(xlabel="number of clusters k", title=title)
        page.count_ticks(axes, profile.heads)
    panels[0].set_ylabel("mean correlation")
    panels[0].plot([], [], "o", color=style.GREY, label="chosen number of clusters")
    page.legend_below(panels[0])
    page.depth_bar(figure, panels, profile.layers)
    notes = (
        "Pearson correlation of the heads' attention, clusters found in each sample by itself, mean over pairs of "
        f"heads and samples. {page.COUNTED}"
    )
    page.finish_profiles(figure, [profile], notes, paper=())
    return figure, data


def plot_data(profile: Profile) -> pd.DataFrame:
    """Return a row for each layer, k and series; no correlation where there is no such pair of heads."""
    layer, k = (place.ravel() for place in np.indices(profile["within"].shape))
    return pd.concat(
        [
            page.rows(
                profile, series=series, layer=layer, k=k + 1, correlation=profile[series].ravel(),
                chosen=k + 1 == profile["clusters"][layer],
            )
            for series in SERIES
        ],
        ignore_index=True,
    )  # fmt: skip
