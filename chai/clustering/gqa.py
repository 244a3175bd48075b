"""Clusters for grouped-query attention that leave whole KV heads unread, so that their keys leave the cache."""

from __future__ import annotations

from math import ceil

import numpy as np

from chai.clustering.medoids import assign, check_counts, first_least, medoid_sets, swap_medoids


def gqa_medoids(cost: np.ndarray, num_kv_heads: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cluster heads such that the representatives read as few KV heads as k of them can.

    Query head ``h`` reads KV head ``h // group`` with ``group = H / num_kv_heads``, and the keys of a KV head stay in
    the cache while any representative reads them. So choose ``ceil(k / group)`` KV heads, and k of their query heads as
    representatives, such that the sum of the heads' costs at the best representative is small. All sets of KV heads
    are tried; where there are more than 5,000, a greedy choice is improved by swaps.

    Args:
        cost: ``[N, H, H]``, of head h with representative r at ``[:, h, r]``; such as squared distances.
        num_kv_heads: KV heads of the model; it divides ``H``.
        counts: ``[N]``, k of each problem.

    Returns:
        labels ``[N, H]`` and representatives ``[N, k_max]`` (padded with H): clusters are numbered by their
        representatives. Each head is assigned to the best representative; of those within 0.01 %, to the lowest.

    Raises:
        ValueError: ``num_kv_heads`` does not divide ``H``, or a k is outside ``[1, H]``.
    """
    num_heads = cost.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads do not divide {num_heads} query heads")
    check_counts(counts, num_heads)
    group = num_heads // num_kv_heads
    reach = cost.swapaxes(1, 2)
    labels = np.empty(cost.shape[:2], dtype=np.int64)
    representatives = np.full((len(cost), counts.max(initial=1)), num_heads)
    for k in set(counts.tolist()):
        (problems,) = (counts == k).nonzero()
        subset = reach[problems]
        # Choose the KV heads, then k of their query heads.
        nearest = subset.reshape(len(subset), num_kv_heads, group, num_heads).min(2)
        chosen = _thin_out(subset, medoid_sets(nearest, ceil(k / group)), group, k)
        labels[problems], representatives[problems, :k] = assign(subset, chosen), chosen
    return labels, representatives


def _members(labels: np.ndarray, k: int) -> np.ndarray:
    """Return ``[N, k, P]`` from labels ``[N, P]``: 1.0 where the point is in the cluster, else 0.0."""
    return (labels.astype(np.int16)[:, None] == np.arange(k, dtype=np.int16)[:, None]).astype(np.float32)


def _thin_out(all_reach: np.ndarray, kv_head_sets: np.ndarray, group: int, k: int) -> np.ndarray:
    """Return the representatives ``[N, k]``, ascending: k query heads of the best set of KV heads.

    All query heads of a set are representatives at first; one by one, that whose loss costs least is removed. In the
    best set, remaining heads are then swapped for removed ones while that lowers the cost.

    ``all_reach [N, H, H]`` has the cost of head h at representative r at ``[:, r, h]``, ``kv_head_sets [N, sets,
    size]`` is ascending, with ``group`` query heads per KV head.
    """
    problems, sets, size = kv_head_sets.shape
    heads = (kv_head_sets[..., None] * group + np.arange(group)).reshape(problems * sets, size * group)
    rows = np.arange(len(heads))
    reach = all_reach[rows[:, None] // sets, heads]  # [N * sets, size * group, H]
    remaining, present = reach.copy(), np.ones(heads.shape, dtype=bool)
    for _ in range(size * group - k):
        first, second = np.partition(remaining, 1, axis=1)[:, :2].swapaxes(0, 1)
        loss = (_members(remaining.argmin(1), size * group) * (second - first)[:, None]).sum(-1)
        removed = first_least(np.where(present, loss, np.inf))
        present[rows, removed] = False
        remaining[rows, removed] = np.inf
    best = first_least(remaining.min(1).sum(-1).reshape(problems, sets)) + rows[::sets]
    chosen = swap_medoids(reach[best], present[best].nonzero()[1].reshape(problems, k))
    return np.take_along_axis(heads[best], chosen, 1)
