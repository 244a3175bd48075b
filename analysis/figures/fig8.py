"""Clustering error against the number of clusters, a curve for each layer, with the number that was chosen."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import profiles
from analysis.figures import _look, _profile
from analysis.profiles import Profile
from analysis.saved import Results

TITLE = "Clustering error against the number of clusters (paper, Figure 8)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND
LOWEST = 1e-3  # of the error with one cluster: below, the logarithmic axis ends, unless a chosen number is there
ZERO = 1e-9  # likewise: below, there is no error but rounding, as with a cluster for each head


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """The error on a logarithmic axis on the left, relative to one cluster's on the right."""
    profile = profiles.best(results)
    data = plotted(profile)
    figure = _profile.page(TITLE, profile, 3.75)
    left, right = figure.subplots(1, 2)
    width = 0.8 if profile.layers <= 40 else 0.5  # points
    shades, _ = _profile.depth(profile.layers)
    positive = data.relative_error > ZERO
    shown = {"error": data.error.where(positive), "relative_error": data.relative_error}
    for axes, column in ((left, "error"), (right, "relative_error")):
        for layer in range(profile.layers):
            points = data[data.layer == layer]
            shade = shades(layer / max(profile.layers - 1, 1))
            axes.plot(points.k, shown[column][points.index], color=shade, linewidth=width, zorder=2)
            chosen = points[points.chosen]
            axes.plot(
                chosen.k,
                shown[column][chosen.index],
                "o",
                markersize=4.5,
                color=shade,
                markeredgecolor="white",
                markeredgewidth=0.5,
                zorder=3,
            )
        axes.set_xlabel("number of clusters k")
        _profile.count_ticks(axes, profile.heads)
    left.set_yscale("log")
    seen = data.error[positive & ((data.relative_error > LOWEST) | data.chosen)]
    if len(seen):
        left.set_ylim(seen.min() / 1.4, seen.max() * 1.4)
    left.set_ylabel("clustering error (squared distance)")
    right.set_ylim(-0.03, 1.03)
    right.set_ylabel("error relative to one cluster's")
    right.plot([], [], "o", color=_look.GREY, label="chosen number of clusters")
    _look.legend_below(right)
    _profile.depth_bar(figure, [left, right], profile.layers)
    _profile.sign(figure, [profile], notes(profile))
    return figure, data


def notes(profile: Profile) -> str:
    """What is drawn, and the rule that chose."""
    rule = profile.about["rule"]
    parameters = ", ".join(f"{name} {value}" for name, value in rule.items() if name != "name")
    return (
        "Squared distances of the heads' attention to the mean of their cluster, clusters found in each sample by "
        f"itself, mean over samples. Chosen by the rule {rule['name']}{f' ({parameters})' if parameters else ''}. "
        f"A logarithmic axis has no place for no error at all, which a cluster for each head has. {_profile.COUNTED}"
    )


def plotted(profile: Profile) -> pd.DataFrame:
    """One row for each layer and k."""
    layer, k = (place.ravel() for place in np.indices(profile["error"].shape))
    error = profile["error"]
    with np.errstate(invalid="ignore"):  # a layer of identical heads has no error at all
        relative = error / error[:, :1]
    return _profile.rows(
        profile,
        layer=layer, k=k + 1, error=error.ravel(), error_sd=profile["error_sd"].ravel(),
        error_static=profile["error_static"].ravel(), relative_error=relative.ravel(),
        chosen=k + 1 == profile["clusters"][layer],
    )  # fmt: skip
