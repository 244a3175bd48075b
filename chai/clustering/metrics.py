"""Agreement of two clusterings, and of values within and between clusters, independent of cluster labels."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from chai.clustering.kmeans import compiled


def contingency(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Count the heads in cluster a of the first and b of the second: labels ``[..., H]`` twice to ``[..., k, k]``."""
    clusters = int(max(first.max(initial=0), second.max(initial=0))) + 1
    one, two = (labels[..., None] == np.arange(clusters) for labels in (first, second))
    return one.swapaxes(-1, -2).astype(np.float32) @ two.astype(np.float32)


def adjusted_rand(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute the adjusted Rand index (Hubert and Arabie, 1985) of labels ``[..., H]``.

    Returns:
        ``[...]``: 1 for equal clusterings, 0 on average for random ones; 1 where both are trivial (one cluster, or as
        many as heads).
    """

    def pairs(counts: np.ndarray) -> np.ndarray:
        return counts * (counts - 1) / 2

    table = contingency(first, second).astype(np.float64)
    together = pairs(table).sum((-1, -2))
    one, two = pairs(table.sum(-1)).sum(-1), pairs(table.sum(-2)).sum(-1)
    expected = one * two / max(pairs(np.array(first.shape[-1])), 1)
    most = (one + two) / 2
    return np.divide(together - expected, most - expected, out=np.ones_like(together), where=most != expected)


def changed_heads(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Count the heads of labels ``[..., H]`` that change clusters under the best matching; returns ``[...]`` (long)."""
    tables = contingency(first, second)
    flat = tables.reshape(-1, *tables.shape[-2:])
    matched = [table[linear_sum_assignment(table, maximize=True)].sum() for table in flat]
    return first.shape[-1] - np.array(matched, dtype=np.int64).reshape(first.shape[:-1])


@compiled
def within_and_between(values, labels):  # type: ignore[no-untyped-def]
    """Average the values of pairs of heads that share a cluster, and of pairs that do not, for several clusterings.

    Args:
        values: ``[N, H, H]``, symmetric, such as correlations.
        labels: ``[N, K, H]``, K clusterings of the same heads.

    Returns:
        within ``[N, K]`` and between ``[N, K]``; NaN without such a pair.
    """
    problems, count, heads = labels.shape
    within, between = np.empty((problems, count)), np.empty((problems, count))
    for problem in range(problems):
        for k in range(count):
            row = labels[problem, k]
            same = other = 0.0
            pairs = 0
            for i in range(heads):
                for j in range(i):
                    if row[i] == row[j]:
                        same += values[problem, i, j]
                        pairs += 1
                    else:
                        other += values[problem, i, j]
            apart = heads * (heads - 1) // 2 - pairs
            within[problem, k] = same / pairs if pairs else np.nan
            between[problem, k] = other / apart if apart else np.nan
    return within, between
