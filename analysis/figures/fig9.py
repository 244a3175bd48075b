"""Cluster membership against tokens seen: heads that change clusters with each token, and agreement with all tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from analysis.plotting import page, style
from analysis.results.profiles import PROFILE, Profile, best_profile
from analysis.results.runs import Results

TITLE = "Cluster membership against tokens seen (paper, Figure 9)"
QUERY = PROFILE
CHANGES, AGREEMENT = "changes", "agreement"
MEAN = "mean"  # in the column of layers
MOST_LINEAR = 40  # tokens; more are drawn on a logarithmic axis, which shows the first ones


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw changes on the left, agreement on the right."""
    profile = best_profile(results)
    data = plot_data(profile)
    figure = page.of_run(profile.run, TITLE, 4.0)
    left, right = figure.subplots(1, 2)
    draw_panel(left, data[data.panel == CHANGES], profile)
    draw_panel(right, data[data.panel == AGREEMENT], profile)
    left.set(xlabel="tokens seen, n (change from n to n + 1)", ylabel="heads that change clusters (%)")
    right.set(xlabel="tokens seen, n", ylabel="agreement with whole sequence\n(adjusted Rand index)")
    page.legend_below(right)
    page.depth_bar(figure, [left, right], profile.layers)
    notes = (
        "Means over samples. Left: membership found from n + 1 tokens against that from n, labels matched. Right: "
        "adjusted Rand index, 1: the same membership. The bold mean is over the layers whose membership can change: of "
        f"more than one cluster and fewer than heads. {page.COUNTED}"
    )
    page.finish_profiles(figure, [profile], notes)
    return figure, data


def can_change(profile: Profile) -> list[int]:
    """Return the layers whose membership can change; all layers, if there are none."""
    return profile.clustered_layers or list(range(profile.layers))


def plot_data(profile: Profile) -> pd.DataFrame:
    """Return a row for each layer and number of tokens, and for the mean over layers."""
    parts = []
    changing = can_change(profile)
    for panel, values, unit in ((CHANGES, 100 * profile["changes"], "%"), (AGREEMENT, profile["agreement"], "")):
        curves = dict(enumerate(values)) | {MEAN: values[changing].mean(axis=0)}
        for layer, curve in curves.items():
            tokens = np.arange(1, len(curve) + 1)
            parts.append(page.rows(profile, panel=panel, layer=layer, tokens=tokens, value=curve, unit=unit))
    return pd.concat(parts, ignore_index=True)


def draw_panel(axes: Axes, data: pd.DataFrame, profile: Profile) -> None:
    """Draw a thin curve for each layer, their mean on top, and the token at which CHAI clusters."""
    depth = page.depth(profile.layers)
    for layer in range(profile.layers):
        points = data[data.layer == layer]
        axes.plot(points.tokens, points.value, color=depth.to_rgba(layer), linewidth=0.6, alpha=0.7)
    # The mean over layers whose membership can change, and the token at which CHAI clusters.
    mean, words = data[data.layer == MEAN], f"mean of {style.plural(len(can_change(profile)), 'layer')}"
    axes.plot(mean.tokens, mean.value, color=style.INK, linewidth=2, label=words)
    decide = profile.about["decide_tokens"]
    line = {"color": style.LOOKS["chai"]["color"], "linestyle": "--", "linewidth": 1.1}
    axes.axvline(decide, label=f"CHAI decides: n = {decide}", **line)
    axes.set_ylim(min(0.0, data.value.min()), data.value.max() * 1.03 or 1)
    last = int(data.tokens.max())
    if last > MOST_LINEAR:
        axes.set_xscale("log")
        ticks = [step * 10**power for power in range(6) for step in (1, 2, 5) if step * 10**power <= last]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.xaxis.set_major_locator(page.whole_numbers())
