"""Heads of one layer that attend alike: their attention over a sentence, and how it correlates."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import profiles
from analysis.figures import _correlation, _maps, _profile
from analysis.profiles import Profile
from analysis.saved import Results

TITLE = "Redundancy across the heads of a layer (paper, Figure 2)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """The map on the left, the correlation on the right, heads in the same order."""
    profile = profiles.best(results)
    layer, among = clearest(profile)
    correlation = profile["sample_correlation"][_maps.SAMPLE]
    groups = profile.order(layer)
    order = np.concatenate(groups)
    tokens = profile.tokens(_maps.SAMPLE)
    figure = _profile.page(TITLE, profile, 5.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    norm = _maps.scale([profile])
    _maps.show(left, profile.map(layer)[order], norm)
    for edge in np.cumsum([len(heads) for heads in groups if len(heads) > 1]) - 0.5:
        left.axhline(edge, color=_correlation.FRAME, linewidth=0.7)
    left.set_title(f"(a) attention to each token, layer {layer}")
    _correlation.show(right, correlation[layer], groups)
    right.set_title(f"(b) correlation of two heads, layer {layer}")
    _maps.label_tokens(left, tokens, 3.1)
    _maps.label_heads(left, [int(head) for head in order], 2.65)
    _maps.label_heads(right, [int(head) for head in order], 2.65)
    _maps.label_heads(right, [int(head) for head in order], 2.65, along="x")
    where = {"location": "bottom", "aspect": 34, "pad": 0.02}
    _maps.bar(figure, norm, ax=left, **where)
    _correlation.bar(figure, ax=right, **where)
    notes = _correlation.NOTES
    if among:
        within, between = _correlation.within_and_between(correlation[layer], profile["assignment"][layer])
        notes = (
            f"Of {among}, the one whose clusters are the clearest in this sample: two heads of a cluster correlate at "
            f"{within:.2f}, of different clusters at {between:.2f}. {notes}"
        )
    _profile.sign(figure, [profile], notes)
    maps = _maps.plotted(profile, [layer]).assign(panel="attention")
    maps = maps.set_index("head").loc[order].reset_index()  # rows as they are drawn
    return figure, pd.concat(
        [maps, _correlation.plotted(profile, correlation, [layer], "correlation")], ignore_index=True
    )


def clearest(profile: Profile) -> tuple[int, str]:
    """Of the layers in the third quarter of the depth, the one whose clusters differ the most from each other.

    That is by the difference of correlation within clusters and between them in the drawn sample. A layer of one
    cluster, or of as many as heads, has no such difference: if all are so, layers elsewhere count as well, and at last
    the middle one is taken.

    Returns:
        The layer, and among which it was chosen, in words; none for the middle one.
    """
    contrast = np.empty(profile.layers)
    for layer, assignment in enumerate(profile["assignment"]):
        correlation = profile["sample_correlation"][_maps.SAMPLE, layer]
        within, between = _correlation.within_and_between(correlation, assignment)
        contrast[layer] = within - between
    middle = profile.layers // 2
    late = np.arange(middle, max(3 * profile.layers // 4, middle + 1))
    everywhere = np.arange(profile.layers)
    for layers, name in ((late, "the layers in the third quarter of the depth"), (everywhere, "all layers")):
        if not np.isnan(contrast[layers]).all():
            return int(layers[np.nanargmax(contrast[layers])]), name
    return middle, ""
