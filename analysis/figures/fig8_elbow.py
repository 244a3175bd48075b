"""Elbow plot of every layer, to read the number of clusters by eye: the chosen one, its interval and other choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import fig8
from analysis.plotting import page, style
from analysis.results.profiles import PROFILE, Profile, best_profile, other_seeds
from analysis.results.runs import Results, Run

TITLE = "Elbow plot of every layer (paper, Figure 8 and Section 3.2)"
QUERY = PROFILE
WIDE_LAYERS = 40  # most layers in four columns; more are in eight, with fewer ticks
CHOSEN = {"color": style.LOOKS["chai"]["color"], "marker": "o", "markeredgecolor": "white", "markeredgewidth": 0.5}
#: Marks of the rules that did not choose; without filling, so that those at the same number stay visible.
RULES: dict[str, dict[str, Any]] = {
    "plateau": {"color": style.LOOKS["mha"]["color"], "marker": "s"},
    "knee": {"color": style.EXTRA[0]["color"], "marker": "^"},
    "sensitivity": {"color": style.EXTRA[2]["color"], "marker": "v"},
    "saving": {"color": style.EXTRA[1]["color"], "marker": "<"},  # of earlier versions, as the next one
    "error": {"color": style.EXTRA[2]["color"], "marker": ">"},
}
OPEN = {"linestyle": "none", "markerfacecolor": "none", "markersize": 7, "markeredgewidth": 0.9}
BAND = {"color": CHOSEN["color"], "alpha": 0.22, "linewidth": 0}


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw the error against k in a panel for each layer; below, all choices of k against the layer."""
    profile = best_profile(results)
    seeds = other_seeds(results, profile)
    data = plot_data(profile, seeds)
    columns = 4 if profile.layers <= WIDE_LAYERS else 8
    lines = math.ceil(profile.layers / columns)
    height = 0.4 + lines * (1.35 if lines <= 2 else 0.95)  # inches
    figure = page.of_run(profile.run, TITLE, 3.2 + height)
    upper, lower = figure.subfigures(2, 1, height_ratios=(height, 2.2))
    grid = list(upper.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    elbows = data[data.panel == "elbow"]
    for layer, axes in enumerate(grid[: profile.layers]):
        draw_elbow(axes, elbows[elbows.layer == layer], profile, layer)
    for place, axes in enumerate(grid):
        axes.set_visible(place < profile.layers)
        axes.tick_params(labelbottom=profile.layers - columns <= place)  # the lowest of each column
    upper.supxlabel("number of clusters k", fontsize=8.5)
    upper.supylabel("relative error", fontsize=8.5)
    draw_counts(lower.subplots(), data[data.panel == "counts"], profile)
    notes = f"{fig8.spread_note(profile)} Errors as in Figure 8, relative to that of one cluster. {page.COUNTED}"
    page.finish_profiles(figure, [profile], notes)
    return figure, data


def other_rules(profile: Profile) -> Mapping[str, list[int]]:
    """Return the numbers of clusters of the rules that did not choose."""
    return {name: counts for name, counts in profile.counts_by_rule.items() if name != profile.rule}


def draw_elbow(axes: Axes, curve: pd.DataFrame, profile: Profile, layer: int) -> None:
    """Draw one layer: its curve, the interval as a band, the chosen number, and open marks of the other rules."""
    k, value = curve.k.to_numpy(), curve.value.to_numpy()
    axes.plot(k, value, color=style.INK, linewidth=0.9, zorder=2)
    if spread := profile.stability:
        axes.axvspan(spread["low"][layer] - 0.5, spread["high"][layer] + 0.5, **BAND)
    for name, counts in other_rules(profile).items():
        axes.plot(counts[layer], value[counts[layer] - 1], zorder=3, **RULES.get(name, {}), **OPEN)
    chosen = profile.clusters[layer]
    axes.plot(chosen, value[chosen - 1], zorder=4, markersize=4.5, **CHOSEN)
    axes.set_title(f"layer {layer}", fontsize=7, pad=2)
    axes.tick_params(labelsize=6)
    if profile.layers <= WIDE_LAYERS:
        page.count_ticks(axes, profile.heads)
    else:
        axes.set_xticks([1, profile.heads // 2, profile.heads])
    axes.set(ylim=(-0.06, 1.06), yticks=(0, 0.5, 1))


def draw_counts(axes: Axes, data: pd.DataFrame, profile: Profile) -> None:
    """Draw the numbers of clusters by layer: chosen with their intervals, of other rules, and of other seeds."""
    layers = np.arange(profile.layers)
    if spread := profile.stability:
        low, high = np.array(spread["low"]) - 0.5, np.array(spread["high"]) + 0.5
        label = f"{100 * spread['level']:g} % interval"
        axes.bar(layers, high - low, width=0.7, bottom=low, label=label, **BAND)
    axes.plot(layers, profile.clusters, linestyle="none", label=f"chosen by {profile.rule}", zorder=4, **CHOSEN)
    for name in other_rules(profile):
        points = data[data.series == name]
        axes.plot(points.layer, points.value, label=name, zorder=3, **RULES.get(name, {}), **OPEN)
    others = data[data.series.str.startswith("seed ")]
    if len(others):
        seeds = others.series.nunique()
        mark = {"color": style.GREY, "marker": "x", "markersize": 3.5, "linestyle": "none", "zorder": 5}
        axes.plot(others.layer, others.value, label=style.plural(seeds, "other seed"), **mark)
    axes.set(xlabel="layer", ylabel="clusters k", ylim=(0, profile.heads + 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(page.whole_numbers())
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def plot_data(profile: Profile, seeds: Mapping[int, Run]) -> pd.DataFrame:
    """Return a row for each point of the curves, and for each layer and choice; ``value`` is an error, or a count."""
    errors = fig8.plot_data(profile).rename(columns={"relative_error": "value"})
    columns = ["layer", "k", "value", "chosen", *(end for end in ("low", "high") if end in errors), "model", "run"]
    choices = {profile.rule: profile.clusters, **other_rules(profile)}
    choices |= {f"seed {seed}": run.result["heads_kept"] for seed, run in seeds.items()}
    counts = [
        page.rows(profile, panel="counts", series=name, layer=range(profile.layers), value=values)
        for name, values in choices.items()
    ]
    return pd.concat([errors[columns].assign(panel="elbow"), *counts], ignore_index=True)
