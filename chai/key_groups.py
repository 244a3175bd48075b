"""Clusters for grouped-query attention that leave whole key heads unread, so that these leave the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import ceil, comb

import numpy as np
from torch import Tensor

from chai.clustering import HeadClusters, pairwise_distances, split_layers


def group_clusters(points: Tensor, key_heads: int, counts: Sequence[int]) -> list[HeadClusters]:
    """Memberships for grouped-query attention that read as few key heads as k representatives can.

    Query head ``h`` reads key head ``h // group`` with ``group = H / key_heads``, and the keys of a key head stay in
    the cache while any representative reads it. So ``ceil(k / group)`` key heads are chosen, and k of their query
    heads represent all, such that the sum of squared distances to the nearest representative is small: all sets of
    key heads are tried, or, where there are more than 5,000, a greedy choice is improved by swaps.

    Args:
        points: ``[L, B, H, F]``, the heads' features.
        key_heads: of the model; it divides ``H``.
        counts: k of each layer.

    Returns:
        the memberships of the ``L`` layers, clusters numbered by their representative; each head belongs to the
        representative nearest to it (within 0.01 %, to the lowest).

    Raises:
        ValueError: ``key_heads`` doesn't divide ``H``, or a k outside ``[1, H]``.
    """
    _, rows, heads, _ = points.shape
    if heads % key_heads:
        raise ValueError(f"{key_heads} key heads don't divide {heads} query heads")
    for wrong in [k for k in counts if not 1 <= k <= heads]:
        raise ValueError(f"{heads} heads can't have {wrong} clusters: choose 1 to {heads}")
    group = heads // key_heads
    distances = pairwise_distances(points.flatten(0, 1))
    assignment = np.empty(distances.shape[:2], dtype=np.int64)
    representatives = np.full((len(distances), max(counts)), heads)
    of_problem = np.repeat(counts, rows)
    for k in set(counts):
        (problems,) = (of_problem == k).nonzero()
        own = distances[problems]
        key_sets = _key_head_sets(own.reshape(len(own), key_heads, group, heads).min(2), ceil(k / group))
        chosen = _thin_out(own, key_sets, group, k)
        labels = _first_least(own[np.arange(len(own))[:, None], chosen].swapaxes(1, 2))
        np.put_along_axis(labels, chosen, np.arange(k)[None], 1)  # its own, also where heads coincide
        assignment[problems], representatives[problems, :k] = labels, chosen
    return split_layers(assignment, representatives, counts, points.device)


def _members(labels: np.ndarray, k: int) -> np.ndarray:
    """``[N, P]`` to ``[N, k, P]``: 1.0 where the point is in the cluster, else 0.0."""
    return (labels.astype(np.int16)[:, None] == np.arange(k, dtype=np.int16)[:, None]).astype(np.float32)


def _first_least(cost: np.ndarray) -> np.ndarray:
    """Index of the first cost along the last axis, none of them negative, that is the least or within 0.01 % of it."""
    return (cost <= cost.min(-1, keepdims=True) * (1 + 1e-4) + 1e-12).argmax(-1)


def _key_head_sets(reach: np.ndarray, size: int) -> np.ndarray:
    """The best few sets of key heads ``[N, sets, size]``, ascending in a set; one set where not all can be tried.

    Args:
        reach: ``[N, K, H]``, squared distance of each head to the nearest query head of each key head.
        size: key heads in a set.
    """
    problems, key_heads, _ = reach.shape
    if comb(key_heads, size) <= 5000:
        sets = np.array(list(combinations(range(key_heads), size)))
        parts = np.array_split(reach, ceil(problems * len(sets) / 10_000))  # to bound the memory
        costs = np.concatenate([part[:, sets].min(2).sum(-1) for part in parts])
        return sets[np.sort(costs.argsort(1, kind="stable")[:, :16])]
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

    Args:
        reach: ``[N, A, H]``, squared distance of each head to each candidate.
        chosen: ``[N, size]`` of the candidates; changed in place.

    Returns:
        ``[N, size]``, ascending.
    """
    candidates, size = reach.shape[1], chosen.shape[1]
    busy = np.arange(len(reach) if size < candidates else 0)
    while len(busy):
        inside = reach[busy[:, None], chosen[busy]]
        others = np.where(np.eye(size, dtype=bool)[..., None], np.inf, inside[:, None]).min(2)  # without each of them
        costs = np.minimum(others[:, :, None], reach[busy, None]).sum(-1)  # [N, size, A], that one for another
        costs[np.arange(len(busy))[:, None], :, chosen[busy]] = np.inf
        flat = costs.reshape(len(busy), -1)
        better = flat.min(1) < (1 - 1e-4) * inside.min(1).sum(-1)
        busy, best = busy[better], _first_least(flat[better])
        chosen[busy, best // candidates] = best % candidates
    return np.sort(chosen)


def _thin_out(distances: np.ndarray, key_sets: np.ndarray, group: int, k: int) -> np.ndarray:
    """Representatives ``[N, k]``, ascending: k query heads of the set of key heads that serves best.

    All query heads of a set stand for themselves at first; one by one, the one goes whose loss costs least. In the
    best set, those that stayed are swapped for those that went while that helps.

    Args:
        distances: ``[N, H, H]``, squared.
        key_sets: ``[N, sets, size]``, ascending in a set.
        group: query heads of a key head.
        k: representatives to keep.
    """
    problems, sets, size = key_sets.shape
    heads = (key_sets[..., None] * group + np.arange(group)).reshape(problems * sets, size * group)
    rows = np.arange(len(heads))
    reach = distances[rows[:, None] // sets, heads]  # [N * sets, size * group, H]
    left, kept = reach.copy(), np.ones(heads.shape, dtype=bool)
    for _ in range(size * group - k):
        first, second = np.partition(left, 1, axis=1)[:, :2].swapaxes(0, 1)
        loss = (_members(left.argmin(1), size * group) * (second - first)[:, None]).sum(-1)
        gone = _first_least(np.where(kept, loss, np.inf))
        kept[rows, gone] = False
        left[rows, gone] = np.inf
    best = _first_least(left.min(1).sum(-1).reshape(problems, sets)) + rows[::sets]
    chosen = _swap(reach[best], kept[best].nonzero()[1].reshape(problems, k))
    return np.take_along_axis(heads[best], chosen, 1)
