"""Clustering error against the number of clusters, a curve for each layer, with the number that was chosen."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plotting import page, style
from analysis.results.profiles import PROFILE, Profile, best_profile
from analysis.results.runs import Results

TITLE = "Clustering error against the number of clusters (paper, Figure 8)"
QUERY = PROFILE
LOWEST = 1e-3  # relative error at which the logarithmic axis ends, unless a chosen number is below
ZERO = 1e-9  # relative error below which there are only rounding errors, as with a cluster for each head
DOT = {"linestyle": "none", "marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5}


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw the error on a logarithmic axis on the left, relative to that of one cluster on the right."""
    profile = best_profile(results)
    data = plot_data(profile)
    figure = page.of_run(profile.run, TITLE, 3.75)
    left, right = figure.subplots(1, 2)
    positive = data.relative_error > ZERO
    draw_curves(left, data.assign(value=data.error.where(positive)), profile)
    draw_curves(right, data.assign(value=data.relative_error), profile)
    # The logarithmic axis ends above rounding errors, but shows every chosen number.
    left.set_yscale("log")
    seen = data.error[positive & ((data.relative_error > LOWEST) | data.chosen)]
    if len(seen):
        left.set_ylim(seen.min() / 1.4, seen.max() * 1.4)
    left.set_ylabel("clustering error (squared distance)")
    right.set(ylim=(-0.03, 1.03), ylabel="error relative to one cluster's")
    right.plot([], [], "o", color=style.GREY, label="chosen number of clusters")
    page.legend_below(right)
    page.depth_bar(figure, [left, right], profile.layers)
    page.finish_profiles(figure, [profile], notes(profile))
    return figure, data


def draw_curves(axes: Axes, data: pd.DataFrame, profile: Profile) -> None:
    """Draw a curve of the column ``value`` for each layer, with a dot at the chosen number of clusters."""
    width = 0.8 if profile.layers <= 40 else 0.5  # points
    depth = page.depth(profile.layers)
    for layer in range(profile.layers):
        points = data[data.layer == layer]
        chosen = points[points.chosen]
        shade = depth.to_rgba(layer)
        axes.plot(points.k, points.value, color=shade, linewidth=width, zorder=2)
        axes.plot(chosen.k, chosen.value, color=shade, zorder=3, **DOT)
        if spread := profile.stability:
            low, high, value = spread["low"][layer], spread["high"][layer], float(chosen.value.iloc[0])
            axes.hlines(value, low, high, color=shade, linewidth=2.5 * width, alpha=0.6, zorder=2.5)
    axes.set_xlabel("number of clusters k")
    page.count_ticks(axes, profile.heads)


def notes(profile: Profile) -> str:
    """Return how to read the figure, with the rule that chose the numbers of clusters."""
    rule = profile.about["rule"]
    parameters = ", ".join(f"{name} {value}" for name, value in rule.items() if name != "name")
    return (
        f"{spread_note(profile)} Squared distances of the heads' attention to the mean of their cluster, clusters "
        "found in each sample by itself, mean over samples. Chosen by the rule "
        f"{rule['name']}{f' ({parameters})' if parameters else ''}. "
        "The logarithmic axis cannot show an error of 0, that of a cluster for each head. "
        f"{page.COUNTED}"
    )


def spread_note(profile: Profile) -> str:
    """Return what the intervals of the numbers of clusters are, or that there are none."""
    spread = profile.stability
    if spread is None:
        return "No interval of the chosen numbers: this profile has no errors of single samples."
    return (
        f"Interval of a chosen number: {100 * spread['level']:g} % of {spread['resamples']:,} bootstrap samples of the "
        "texts; it says nothing about the choice of the rule."
    )


def plot_data(profile: Profile) -> pd.DataFrame:
    """Return a row for each layer and k; ``low`` and ``high`` are the ends of the interval of the layer's chosen k."""
    layer, k = (place.ravel() for place in np.indices(profile["error"].shape))
    error = profile["error"]
    with np.errstate(invalid="ignore"):  # the error of a layer of identical heads is 0
        relative = error / error[:, :1]
    spread = profile.stability
    interval = {end: np.array(spread[end])[layer] for end in ("low", "high")} if spread else {}
    return page.rows(
        profile,
        layer=layer, k=k + 1, error=error.ravel(), error_sd=profile["error_sd"].ravel(),
        error_static=profile["error_static"].ravel(), relative_error=relative.ravel(),
        chosen=k + 1 == profile["clusters"][layer], **interval,
    )  # fmt: skip
