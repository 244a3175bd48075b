"""Attention of one layer in two models: heads with uniform attention, which could be left out, or none."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import profiles
from analysis.figures import _look, _maps, _profile
from analysis.profiles import Profile
from analysis.saved import Results

TITLE = "Uniform attention and redundant heads (paper, Figure 4)"
EXPERIMENT = _profile.EXPERIMENT
COMMAND = _profile.COMMAND
PAPER = (_profile.OPT, _profile.LLAMA)
UNIFORM = 0.9  # of the entropy of uniform attention: from here on it counts as nearly uniform


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """A map of each model's layer, on the same scale of colours."""
    drawn = profiles.of_models(results, PAPER)
    names = "; ".join(f"{_look.label(one.run.model)}: {one.layers} layers of {one.heads} heads" for one in drawn)
    figure = _profile.headed(f"{TITLE}\n{names}", 5.1)
    panels = list(figure.subplots(1, len(drawn), squeeze=False).flat)
    norm = _maps.scale(drawn)
    data = []
    gap = " " if len(drawn) <= 2 else "\n"
    for letter, axes, profile in zip(_profile.LETTERS, panels, drawn, strict=False):
        layer = most_uniform(profile)
        uniform = profile["entropy"] > UNIFORM
        _maps.show(axes, profile.map(layer), norm)
        _maps.label_tokens(axes, profile.tokens(_maps.SAMPLE), 6.0 / len(drawn) - 0.3)
        _maps.label_heads(axes, range(profile.heads), 3.2)
        axes.set_title(
            f"({letter}) {_look.label(profile.run.model)}, layer {layer}\n"
            f"nearly uniform: {uniform[layer].sum()} of {profile.heads} heads;{gap}"
            f"all layers: {100 * uniform.mean():.1f} %",
            fontsize=8,
        )
        rows = _maps.plotted(profile, [layer])
        entropy = profile["entropy"][layer][rows["head"]]
        data.append(rows.assign(entropy=entropy, nearly_uniform=entropy > UNIFORM))
    _maps.bar(figure, norm, ax=panels, fraction=0.035, pad=0.015, aspect=32)
    notes = (
        f"The layer with the most heads of nearly uniform attention, whose entropy is over {UNIFORM:g} of the greatest "
        f"possible, mean over all samples. {_maps.NOTES}"
    )
    _profile.sign(figure, drawn, notes, PAPER)
    return figure, pd.concat(data, ignore_index=True)


def most_uniform(profile: Profile) -> int:
    """The layer with the most heads of nearly uniform attention; of several, the one with the greatest entropy."""
    entropy = profile["entropy"]
    return int(np.lexsort((entropy.mean(axis=1), (entropy > UNIFORM).sum(axis=1)))[-1])
