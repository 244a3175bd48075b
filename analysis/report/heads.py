"""Our numbers for the paper's claims about redundant heads, from head profiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, spearmanr

from analysis.figures import fig4, fig9
from analysis.plotting import correlation
from analysis.plotting.style import clusters, plural
from analysis.report import conditions
from analysis.report.conditions import PassedOver, combined
from analysis.report.source import MISSING, Ours, Source
from analysis.results.profiles import PROFILE, Profile, load_profile
from analysis.results.runs import MissingRun, Run
from analysis.stats import LEVEL, Interval

NO_REDUNDANCY = "no redundancy found"
LEAST_REST = 3  # clusters of a layer, if any are beside the two largest


def _profile(source: Source, model: str, samples: str = "1", corpus: str = "") -> Profile:
    """Return the newest head profile that counts, with a minimum number of texts, and optionally of one corpus."""

    def enough(run: Run) -> str:
        if corpus and run.result.get("task") != corpus:
            return f"of corpus {run.result.get('task')}, the paper's is {corpus}"
        n = run.result.get("n")
        return f"{n:,} texts, the paper has {int(samples):,}" if isinstance(n, int) and n < int(samples) else ""

    results = source.results.of(model)
    for run in results.ranked(PROFILE):
        if source.counts(run, model, (enough,)):
            profile = results.attempt(run.folder, load_profile, run)
            if profile is None:
                continue
            if profile.samples < int(samples):
                reason = f"{profile.samples:,} texts, the paper has {int(samples):,}"
                source.passed.append(PassedOver(run, reason))
                continue
            results.used.append(run)
            return profile
    raise results.missing(PROFILE)


def _of_profile(profile: Profile, interval: Interval, detail: str, certainty: str, layers: Sequence[int] = ()) -> Ours:
    """Return a number of a profile; it decides nothing if hardly any heads of its layers are redundant.

    Args:
        profile: where it is from.
        interval: the number.
        detail: layer or length.
        certainty: what the interval accounts for.
        layers: layers that the number depends on the clusters of; none: it does not depend on clusters.
    """
    caveat = ""
    if len(layers):
        counts = [profile.clusters[layer] for layer in layers]
        if combined(counts, profile.heads) < conditions.LEAST_COMBINED:
            caveat = f"{NO_REDUNDANCY}: {clusters(counts)} of {profile.heads} heads, so nothing is clustered"
    return Ours(interval, certainty, [profile.run], detail, caveat=caveat)


def cluster_correlation(source: Source, model: str, **wanted: str) -> Ours:
    """Return the correlation of two heads of a cluster in one text, the greatest mean of any layer that is clustered.

    A layer counts as clustered if at most half as many clusters as heads are left: the two most similar of many heads
    correlate whatever the others do.
    """
    profile = _profile(source, model, **wanted)
    values, assignment = profile.sample_correlation, profile["assignment"]
    layers = [layer for layer in profile.clustered_layers if 2 * profile.clusters[layer] <= profile.heads]
    means = [correlation.within_and_between(values[layer], assignment[layer])[0] for layer in layers]
    certainty = "one text, as in the paper: no interval"
    if not means or np.isnan(means).all():
        counts = clusters(profile.clusters)
        caveat = f"{NO_REDUNDANCY}: {counts} of {profile.heads} heads, in no layer at most half"
        return Ours(Interval.exact(float("nan")), certainty, [profile.run], caveat=caveat)
    layer = layers[int(np.nanargmax(means))]
    detail = f"layer {layer}, {profile.clusters[layer]} clusters"
    return _of_profile(profile, Interval.exact(float(np.nanmax(means))), detail, certainty, [layer])


def correlation_growth(source: Source, model: str, **wanted: str) -> Ours:
    """Return the rank correlation (Spearman) of a layer's depth and the mean correlation of two of its heads."""
    profile = _profile(source, model, **wanted)
    means = correlation.between_heads(profile["correlation"])
    known = np.flatnonzero(~np.isnan(means))
    if len(known) < 5 or np.ptp(means[known]) == 0:
        raise MissingRun(MISSING, PROFILE.command)
    rho, layers = float(spearmanr(known, means[known]).statistic), len(known)
    # Fisher's transformation, with the standard error of a rank correlation (Fieller, Hartley and Pearson, 1957).
    middle, half = np.arctanh(np.clip(rho, -0.9999, 0.9999)), norm.ppf((1 + LEVEL) / 2) * math.sqrt(1.06 / (layers - 3))
    interval = Interval(rho, float(np.tanh(middle - half)), float(np.tanh(middle + half)))
    detail = f"mean {means[known[0]]:.2f} in the first layer, {means[known[-1]]:.2f} in the last"
    return _of_profile(profile, interval, detail, f"over {layers} layers (Fisher), {profile.samples:,} texts")


def first_layer_correlation(source: Source, model: str, **wanted: str) -> Ours:
    """Return the mean correlation of two heads of the first layer."""
    profile = _profile(source, model, **wanted)
    value = float(correlation.between_heads(profile["correlation"])[0])
    if np.isnan(value):
        raise MissingRun(MISSING, PROFILE.command)
    return _of_profile(profile, Interval.exact(value), "layer 0", f"mean over {profile.samples:,} texts: no interval")


def uniform_heads(source: Source, model: str, **wanted: str) -> Ours:
    """Return how many heads of all layers have nearly uniform attention, as :mod:`analysis.figures.fig4` defines it."""
    profile = _profile(source, model, **wanted)
    uniform = profile["entropy"] > fig4.UNIFORM
    layer = fig4.most_uniform(profile)
    detail = f"of {uniform.size:,} heads; the most, {uniform[layer].sum()}, in layer {layer}"
    certainty = f"entropy over {fig4.UNIFORM:g} of the greatest, mean over {profile.samples:,} texts: no interval"
    return _of_profile(profile, Interval.exact(int(uniform.sum())), detail, certainty)


def largest_cluster(source: Source, model: str, layer: str, **wanted: str) -> Ours:
    """Return the share of a layer's heads that are in its largest cluster, %."""
    profile = _profile(source, model, **wanted)
    sizes, at = _sizes(profile, int(layer))
    detail = f"layer {at}, {plural(len(sizes), 'cluster')}"
    certainty = f"mean over {profile.samples:,} texts: no interval"
    return _of_profile(profile, Interval.exact(100 * sizes[0] / profile.heads), detail, certainty, [at])


def cluster_skew(source: Source, model: str, layer: str, **wanted: str) -> Ours:
    """Return how many times as large as the others the two largest clusters of a layer are, means of both."""
    profile = _profile(source, model, **wanted)
    sizes, at = _sizes(profile, int(layer))
    detail, certainty = (
        f"layer {at}, {plural(len(sizes), 'cluster')}",
        f"mean over {profile.samples:,} texts: no interval",
    )
    if len(sizes) < LEAST_REST:
        caveat = f"{plural(len(sizes), 'cluster')} in layer {at}: none beside the two largest"
        return Ours(Interval.exact(float("nan")), certainty, [profile.run], detail, caveat=caveat)
    ratio = float(sizes[:2].mean() / sizes[2:].mean())
    return _of_profile(profile, Interval.exact(ratio), detail, certainty, [at])


def _sizes(profile: Profile, layer: int) -> tuple[np.ndarray, int]:
    """Return the mean sizes of a layer's clusters, the largest first, and the layer; MissingRun: it has no such."""
    if layer >= profile.layers:
        raise MissingRun(MISSING, PROFILE.command)
    k = profile.clusters[layer]
    return profile["cluster_sizes"][layer, k - 1, :k], layer


def settled_tokens(source: Source, model: str, changing: str, **wanted: str) -> Ours:
    """Return the token from which on fewer than a share of the heads change clusters with the next token."""
    profile = _profile(source, model, **wanted)
    mean = profile["changes"][fig9.can_change(profile)].mean(axis=0)
    # The last token at which too many heads still change.
    late = np.flatnonzero(mean >= float(changing))
    settled = int(late[-1]) + 2 if len(late) else 1  # entry n - 1 is the change from n to n + 1 tokens
    detail = f"of up to {profile['agreement'].shape[1]:,} tokens; {clusters(profile.clusters)}"
    certainty = f"mean over {profile.samples:,} texts: no interval"
    return _of_profile(profile, Interval.exact(settled), detail, certainty, range(profile.layers))
