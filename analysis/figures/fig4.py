"""Attention of one layer in two models, with and without heads of uniform attention (which could be removed)."""

from __future__ import annotations

from string import ascii_lowercase

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plotting import maps, page, style
from analysis.results.profiles import PROFILE, Profile, best_profile, best_profiles
from analysis.results.runs import Results

TITLE = "Uniform attention and redundant heads (paper, Figure 4)"
QUERY = PROFILE
PAPER = (page.OPT, page.LLAMA)
UNIFORM = 0.9  # attention counts as nearly uniform above this share of the greatest possible entropy


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw a map of each model's layer, with the same colours."""
    if results.models:
        profiles = [best_profile(results.of(model)) for model in results.models]
    else:
        profiles = best_profiles(results, PAPER, most=2)
    names = "; ".join(f"{style.label(one.run.model)}: {one.layers} layers of {one.heads} heads" for one in profiles)
    figure = page.new(f"{TITLE}\n{names}", 5.1)
    panels = list(figure.subplots(1, len(profiles), squeeze=False).flat)
    norm = maps.scale(profiles)
    data = []
    gap = " " if len(profiles) <= 2 else "\n"
    for letter, axes, profile in zip(ascii_lowercase, panels, profiles, strict=False):
        layer = most_uniform(profile)
        uniform = profile["entropy"] > UNIFORM
        maps.show(axes, profile.map(layer), norm)
        maps.label_tokens(axes, profile.tokens, 6.0 / len(profiles) - 0.3)
        maps.label_heads(axes, range(profile.heads), 3.2)
        # Count the heads of nearly uniform attention in this layer and in all.
        axes.set_title(
            f"({letter}) {style.label(profile.run.model)}, layer {layer}\n"
            f"nearly uniform: {uniform[layer].sum()} of {profile.heads} heads;{gap}"
            f"all layers: {100 * uniform.mean():.1f} %",
            fontsize=8,
        )
        rows = maps.plot_data(profile, [layer])
        entropy = profile["entropy"][layer][rows["head"]]
        data.append(rows.assign(entropy=entropy, nearly_uniform=entropy > UNIFORM))
    maps.bar(figure, norm, ax=panels, fraction=0.035, pad=0.015, aspect=32)
    notes = (
        f"The layer with the most heads of nearly uniform attention, whose entropy is over {UNIFORM:g} of the greatest "
        f"possible, mean over all samples. {maps.NOTES}"
    )
    page.finish_profiles(figure, profiles, notes, PAPER)
    return figure, pd.concat(data, ignore_index=True)


def most_uniform(profile: Profile) -> int:
    """Return the layer with the most heads of nearly uniform attention; of several, that of the greatest entropy."""
    entropy = profile["entropy"]
    return int(np.lexsort((entropy.mean(axis=1), (entropy > UNIFORM).sum(axis=1)))[-1])
