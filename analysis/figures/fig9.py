"""How soon the membership settles: heads that change clusters with each token, and agreement with all tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from analysis import profiles
from analysis.figures import _look, _profile
from analysis.profiles import Profile
from analysis.saved import Results

TITLE = "Cluster membership against tokens seen (paper, Figure 9)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND
CHANGES, AGREEMENT = "changes", "agreement"
MEAN = "mean"  # in the place of the layer
MOST_LINEAR = 40  # tokens; more go on a logarithmic axis, for what happens early to be seen


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Changes on the left, agreement on the right."""
    profile = profiles.best(results)
    data = plotted(profile)
    figure = _profile.page(TITLE, profile, 4.0)
    left, right = figure.subplots(1, 2)
    draw_panel(left, data[data.panel == CHANGES], profile)
    draw_panel(right, data[data.panel == AGREEMENT], profile)
    left.set_ylabel("heads that change clusters (%)")
    left.set_xlabel("tokens seen, n (change from n to n + 1)")
    right.set_ylabel("agreement with whole sequence\n(adjusted Rand index)")
    right.set_xlabel("tokens seen, n")
    _look.legend_below(right)
    _profile.depth_bar(figure, [left, right], profile.layers)
    notes = (
        "Means over samples. Left: membership found from n + 1 tokens against that from n, labels matched. Right: "
        "adjusted Rand index, 1: the same membership. The bold mean is over the layers whose membership can change: of "
        f"more than one cluster and fewer than heads. {_profile.COUNTED}"
    )
    _profile.sign(figure, [profile], notes)
    return figure, data


def can_change(profile: Profile) -> list[int]:
    """Layers of more than one cluster and fewer than heads; all layers, if there are none."""
    layers = [layer for layer, k in enumerate(profile.clusters) if 1 < k < profile.heads]
    return layers or list(range(profile.layers))


def plotted(profile: Profile) -> pd.DataFrame:
    """One row for each layer and number of tokens, and for the mean over layers."""
    parts = []
    changing = can_change(profile)
    for panel, values, unit in ((CHANGES, 100 * profile["changes"], "%"), (AGREEMENT, profile["agreement"], "")):
        curves = dict(enumerate(values)) | {MEAN: values[changing].mean(axis=0)}
        for layer, curve in curves.items():
            tokens = np.arange(1, len(curve) + 1)
            parts.append(_profile.rows(profile, panel=panel, layer=layer, tokens=tokens, value=curve, unit=unit))
    return pd.concat(parts, ignore_index=True)


def draw_panel(axes: Axes, data: pd.DataFrame, profile: Profile) -> None:
    """A thin curve for each layer, their mean on top, and when CHAI decides."""
    shades, _ = _profile.depth(profile.layers)
    for layer in range(profile.layers):
        points = data[data.layer == layer]
        axes.plot(
            points.tokens, points.value, color=shades(layer / max(profile.layers - 1, 1)), linewidth=0.6, alpha=0.7
        )
    changing = can_change(profile)
    mean = data[data.layer == MEAN]
    many = f"{len(changing)} layer{'s' if len(changing) != 1 else ''}"
    axes.plot(mean.tokens, mean.value, color=_look.INK, linewidth=2, label=f"mean of {many}")
    decide = profile.about["decide_tokens"]
    axes.axvline(
        decide, color=_look.LOOKS["chai"]["color"], linestyle="--", linewidth=1.1, label=f"CHAI decides: n = {decide}"
    )
    axes.set_ylim(min(0.0, data.value.min()), data.value.max() * 1.03 or 1)
    last = int(data.tokens.max())
    if last > MOST_LINEAR:
        axes.set_xscale("log")
        ticks = [step * 10**power for power in range(6) for step in (1, 2, 5) if step * 10**power <= last]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.xaxis.set_major_locator(_profile.whole_numbers())
