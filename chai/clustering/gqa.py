"""Clusters for grouped-query attention that leave whole KV heads unread, so that their keys leave the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import ceil, comb

import numpy as np
from torch import Tensor

from chai.clustering.assignment import split_layers
from chai.clustering.kmeans import pairwise_distances
from chai.heads import HeadClusters

#: Up to this many sets of KV heads, all are tried.
EXHAUSTIVE = 5000


def gqa_clusters(features: Tensor, num_kv_heads: int, num_clusters: Sequence[int]) -> list[HeadClusters]:
    """Cluster heads such that the representatives read as few KV heads as k of them can.

    Query head ``h`` reads KV head ``h // group`` with ``group = H / num_kv_heads``, and the keys of a KV head stay in
    the cache while any representative reads them. So choose ``ceil(k / group)`` KV heads, and k of their query heads as
    representatives, such that the sum of squared distances to the nearest representative is small. All sets of KV heads
    are tried; where there are more than 5,000, a greedy choice is improved by swaps.

    Args:
        features: ``[L, B, H, F]``.
        num_kv_heads: KV heads of the model; it divides ``H``.
        num_clusters: k of each layer.

    Returns:
        The clusters of the ``L`` layers, numbered by their representatives. Each head is assigned to the nearest
        representative; of those within 0.01 %, to the lowest.

    Raises:
        ValueError: ``num_kv_heads`` does not divide ``H``, or a k is outside ``[1, H]``.
    """
    _, batch_size, num_heads, _ = features.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads do not divide {num_heads} query heads")
    for wrong in [k for k in num_clusters if not 1 <= k <= num_heads]:
        raise ValueError(f"{num_heads} heads cannot have {wrong} clusters; valid: 1 to {num_heads}")
    group = num_heads // num_kv_heads
    distances = pairwise_distances(features.flatten(0, 1).detach().cpu().float().numpy())
    assignment = np.empty(distances.shape[:2], dtype=np.int64)
    representatives = np.full((len(distances), max(num_clusters)), num_heads)
    counts = np.repeat(num_clusters, batch_size)
    for k in set(num_clusters):
        (problems,) = (counts == k).nonzero()
        subset = distances[problems]
        # Choose the KV heads, then k of their query heads.
        reach = subset.reshape(len(subset), num_kv_heads, group, num_heads).min(2)
        chosen = _thin_out(subset, _kv_head_sets(reach, ceil(k / group)), group, k)
        # Assign every head to the nearest representative.
        labels = _first_least(subset[np.arange(len(subset))[:, None], chosen].swapaxes(1, 2))
        np.put_along_axis(labels, chosen, np.arange(k)[None], 1)  # its own cluster, also where heads coincide
        assignment[problems], representatives[problems, :k] = labels, chosen
    return split_layers(assignment, representatives, num_clusters, features.device)


def _members(labels: np.ndarray, k: int) -> np.ndarray:
    """Return ``[N, k, P]`` from labels ``[N, P]``: 1.0 where the point is in the cluster, else 0.0."""
    return (labels.astype(np.int16)[:, None] == np.arange(k, dtype=np.int16)[:, None]).astype(np.float32)


def _first_least(cost: np.ndarray) -> np.ndarray:
    """Return the index of the first non-negative cost along the last axis that is within 0.01 % of the least."""
    return (cost <= cost.min(-1, keepdims=True) * (1 + 1e-4) + 1e-12).argmax(-1)


def _kv_head_sets(reach: np.ndarray, size: int) -> np.ndarray:
    """Return the best few sets of KV heads ``[N, sets, size]``, ascending; a single set where not all can be tried.

    ``reach [N, H_kv, H]`` is the squared distance of each head to the nearest query head of each KV head.
    """
    problems, num_kv_heads, _ = reach.shape
    if comb(num_kv_heads, size) <= EXHAUSTIVE:
        sets = np.array(list(combinations(range(num_kv_heads), size)))
        parts = np.array_split(reach, ceil(problems * len(sets) / 10_000))  # to bound the memory
        costs = np.concatenate([part[:, sets].min(2).sum(-1) for part in parts])
        return sets[np.sort(costs.argsort(1, kind="stable")[:, :16])]
    # Greedy: add the KV head that lowers the cost most, then swap.
    rows = np.arange(problems)
    chosen = np.empty((problems, 0), dtype=np.int64)
    nearest = np.full(reach[:, 0].shape, np.inf)
    for _ in range(size):
        costs = np.minimum(reach, nearest[:, None]).sum(-1)
        costs[rows[:, None], chosen] = np.inf
        chosen = np.append(chosen, _first_least(costs)[:, None], 1)
        nearest = np.minimum(nearest, reach[rows, chosen[:, -1]])
    return _swap(reach, chosen)[:, None]


def _swap(reach: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Swap chosen medoids for others, the best swap first, until none lowers the cost by more than 0.01 %.

    ``reach [N, A, H]`` is the squared distance of each head to each candidate, ``chosen [N, size]`` are indices of
    candidates, changed in place; returned ascending.
    """
    candidates, size = reach.shape[1], chosen.shape[1]
    active = np.arange(len(reach) if size < candidates else 0)
    while len(active):
        inside = reach[active[:, None], chosen[active]]
        # Distance to the nearest medoid without each of them; cost [N, size, A] of each swap.
        without = np.where(np.eye(size, dtype=bool)[..., None], np.inf, inside[:, None]).min(2)
        costs = np.minimum(without[:, :, None], reach[active, None]).sum(-1)
        costs[np.arange(len(active))[:, None], :, chosen[active]] = np.inf
        flat = costs.reshape(len(active), -1)
        better = flat.min(1) < (1 - 1e-4) * inside.min(1).sum(-1)
        active, best = active[better], _first_least(flat[better])
        chosen[active, best // candidates] = best % candidates
    return np.sort(chosen)


def _thin_out(distances: np.ndarray, kv_head_sets: np.ndarray, group: int, k: int) -> np.ndarray:
    """Return the representatives ``[N, k]``, ascending: k query heads of the best set of KV heads.

    All query heads of a set are representatives at first; one by one, that whose loss costs least is removed. In the
    best set, remaining heads are then swapped for removed ones while that lowers the cost.

    ``distances [N, H, H]`` are squared, ``kv_head_sets [N, sets, size]`` ascending, with ``group`` query heads per KV
    head.
    """
    problems, sets, size = kv_head_sets.shape
    heads = (kv_head_sets[..., None] * group + np.arange(group)).reshape(problems * sets, size * group)
    rows = np.arange(len(heads))
    reach = distances[rows[:, None] // sets, heads]  # [N * sets, size * group, H]
    remaining, present = reach.copy(), np.ones(heads.shape, dtype=bool)
    for _ in range(size * group - k):
        first, second = np.partition(remaining, 1, axis=1)[:, :2].swapaxes(0, 1)
        loss = (_members(remaining.argmin(1), size * group) * (second - first)[:, None]).sum(-1)
        removed = _first_least(np.where(present, loss, np.inf))
        present[rows, removed] = False
        remaining[rows, removed] = np.inf
    best = _first_least(remaining.min(1).sum(-1).reshape(problems, sets)) + rows[::sets]
    chosen = _swap(reach[best], present[best].nonzero()[1].reshape(problems, k))
    return np.take_along_axis(heads[best], chosen, 1)
