"""Redundant heads of one layer: their attention over a sentence, and its correlation."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plotting import correlation, maps, page
from analysis.results.profiles import PROFILE, Profile, best_profile
from analysis.results.runs import Results

TITLE = "Redundancy across the heads of a layer (paper, Figure 2)"
QUERY = PROFILE


def draw(results: Results, clusters: int | None = None) -> tuple[Figure, pd.DataFrame]:
    """Draw the map on the left and the correlation on the right, heads in the same order.

    ``clusters`` replaces the chosen numbers of clusters.
    """
    profile = best_profile(results).at(clusters)
    layer, searched = clearest(profile)
    values = profile.sample_correlation
    groups = profile.order(layer)
    order = np.concatenate(groups)
    figure = page.of_run(profile.run, TITLE, 5.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))

    # The map, with lines between clusters of two heads and more.
    norm = maps.scale([profile])
    maps.show(left, profile.map(layer)[order], norm)
    for edge in np.cumsum([len(heads) for heads in groups if len(heads) > 1]) - 0.5:
        left.axhline(edge, color=correlation.FRAME, linewidth=0.7)
    left.set_title(f"(a) attention to each token, layer {layer}")
    maps.label_tokens(left, profile.tokens, 3.1)
    maps.label_heads(left, order, 2.65)

    # The correlation.
    correlation.show(right, values[layer], groups)
    right.set_title(f"(b) correlation of two heads, layer {layer}")
    for along in "yx":
        maps.label_heads(right, order, 2.65, along)
    where = {"location": "bottom", "aspect": 34, "pad": 0.02}
    maps.bar(figure, norm, ax=left, **where)
    correlation.bar(figure, ax=right, **where)

    notes = correlation.notes(clusters)
    if searched:
        within, between = correlation.within_and_between(values[layer], profile["assignment"][layer])
        notes = (
            f"Of {searched}, the one whose clusters are the clearest in this sample: two heads of a cluster correlate "
            f"at {within:.2f}, of different clusters at {between:.2f}. {notes}"
        )
    page.finish_profiles(figure, [profile], notes)
    attention = maps.plot_data(profile, [layer]).assign(panel="attention")
    attention = attention.set_index("head").loc[order].reset_index()  # rows as they are drawn
    pairs = correlation.plot_data(profile, values, [layer], "correlation")
    return figure, pd.concat([attention, pairs], ignore_index=True)


def clearest(profile: Profile) -> tuple[int, str]:
    """Choose the layer whose clusters differ the most, by correlation within clusters minus between them.

    The layers in the third quarter of the depth are searched first. A layer of one cluster, or of as many as heads, has
    no such difference; if all are so, all layers are searched.

    Returns:
        The layer, and which layers were searched in words; the middle layer and no words if none has clusters.
    """
    layers = zip(profile.sample_correlation, profile["assignment"], strict=True)
    means = np.array([correlation.within_and_between(*layer) for layer in layers])
    contrast = means[:, 0] - means[:, 1]
    middle = profile.layers // 2
    late = np.arange(middle, max(3 * profile.layers // 4, middle + 1))
    everywhere = np.arange(profile.layers)
    for searched, name in ((late, "the layers in the third quarter of the depth"), (everywhere, "all layers")):
        if not np.isnan(contrast[searched]).all():
            return int(searched[np.nanargmax(contrast[searched])]), name
    return middle, ""
