"""Agreement of the clusters of different requests, domains, layers and numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chai.clustering.metrics import adjusted_rand


def agreements(
    labels: Sequence[np.ndarray], whole: Sequence[np.ndarray], corpora: Sequence[str]
) -> list[dict[str, float]]:
    """Compare the clusters of each text with others, by the adjusted Rand index.

    Args:
        labels: Of each text, ``[L, H]``, clusters by its first tokens.
        whole: The same by the whole text.
        corpora: Of each text, the name of its corpus.

    Returns:
        For each text, means over the layers and the texts that it is compared with. A comparison that a text has
        nothing for is left out.
    """
    found = []
    for own, (mine, full) in enumerate(zip(labels, whole, strict=True)):
        others = [(labels[text], corpora[text] == corpora[own]) for text in range(len(labels)) if text != own]
        full_others = [whole[text] for text in range(len(whole)) if text != own and corpora[text] == corpora[own]]
        pairs = {
            "first tokens: two requests of a corpus": [(mine, other) for other, same in others if same],
            "first tokens: requests of two corpora": [(mine, other) for other, same in others if not same],
            "first tokens: neighbouring layers": [(mine[:-1], mine[1:])] if len(mine) > 1 else [],
            "first tokens and the whole text": [(mine, full)],
            "whole text: two requests of a corpus": [(full, other) for other in full_others],
            "whole text: neighbouring layers": [(full[:-1], full[1:])] if len(full) > 1 else [],
        }
        found.append({
            name: float(np.mean([adjusted_rand(first, second).mean() for first, second in compared]))
            for name, compared in pairs.items()
            if compared
        })  # fmt: skip
    return found
