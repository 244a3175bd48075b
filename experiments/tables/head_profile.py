"""The table of a head profile, read back from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chai.offline.head_profile import HeadProfile
from experiments.system.console import log_info
from experiments.tables.layout import make_table, print_table

COLUMNS = (
    "Layer",
    "Clusters",
    "95 %",
    "Halves",
    "Millinats",
    "Error",
    "Largest",
    "Corr.",
    "First",
    "Agree",
    "Changes",
)


def show_head_profile(folder: Path) -> None:
    """Print a row for each layer: its clusters, and the evidence for them."""
    profile = HeadProfile.load(folder)
    about, arrays = profile.about, profile.arrays
    model, corpus, heads = about["model"], about["corpus"], about["model"]["heads"]
    rule = ", ".join(f"{key} {value}" for key, value in about["rule"].items() if key != "name")
    title = (
        f"{model['name']}, {heads} heads, on {corpus['samples']} samples of {corpus['name']} "
        f"({corpus['tokens']:,} tokens); rule: {about['rule']['name']} ({rule})"
    )
    measured = sensitivity_cells(profile)
    table = make_table(title, [], [name for name in COLUMNS if name != "Millinats" or measured])
    tokens = about["decide_tokens"]
    off_diagonal = ~np.eye(heads, dtype=bool)
    stability = about.get("stability")  # null or missing: no errors of single texts
    for layer, k in enumerate(profile.num_clusters):
        error = arrays["error"][layer]
        table.add_row(
            f"{layer}",
            f"{k}",
            f"{stability['low'][layer]}-{stability['high'][layer]}" if stability else "",
            f"{100 * stability['halves_equal'][layer]:.0f} %" if stability else "",
            *measured[layer : layer + 1],
            f"{100 * error[k - 1] / error[0]:.1f} %" if error[0] > 0 else "0.0 %",
            f"{arrays['cluster_sizes'][layer, k - 1, 0]:.1f}",
            f"{arrays['correlation'][layer][off_diagonal].mean():.2f}" if heads > 1 else "",
            f"{100 * arrays['first_token'][layer].mean():.0f} %",
            f"{arrays['agreement'][layer, tokens - 1]:.2f}",
            f"{100 * arrays['changes'][layer, tokens - 1]:.1f} %",
        )
    spread = (
        "95 %: percentile interval of the clusters, bootstrap of the texts. Halves: random splits of the texts whose\n"
        "halves have the same number of clusters."
        if stability
        else "No interval of the clusters: the errors of single texts are not in this profile."
    )
    if measured:
        texts = about["sensitivity"]["texts"]
        spread += (
            "\nMillinats: sensitivity, the KL divergence of the next-token distribution when this layer alone runs\n"
            f"on its clusters, per token, and its standard error over the {texts} texts; -: not measured."
        )
    legend = (
        f"{spread}\n"
        "Error: what is left of that with one cluster, each sample clustered by itself. Largest: heads of the largest\n"
        "cluster. Corr.: correlation between two heads' attention, mean. First: the first token's share of it.\n"
        f"Agree: adjusted Rand index of the clusters after {tokens} tokens with those of the whole text.\n"
        "Changes: heads that change clusters with the next token."
    )
    print_table(table, legend)
    log_info(
        f"{100 * about['saving']:.1f} % of the KV bytes saved with these counts. Use them: method.profile={folder}"
    )


def sensitivity_cells(profile: HeadProfile) -> list[str]:
    """Return the sensitivity of each layer at its number of clusters, as text; empty if none was measured."""
    measured, heads = profile.about.get("sensitivity"), profile.about["model"]["heads"]
    if not measured:
        return []
    cells = []
    for layer, k in enumerate(profile.num_clusters):
        if k == heads:  # by definition
            cells.append("0")
        elif k not in measured["counts"]:
            cells.append("-")
        else:
            texts = 1000 * profile.arrays["sensitivity"][:, layer, measured["counts"].index(k)].astype(np.float64)
            spread = f" ± {texts.std(ddof=1) / len(texts) ** 0.5:.2f}" if len(texts) > 1 else ""
            cells.append(f"{texts.mean():.2f}{spread}")
    return cells
