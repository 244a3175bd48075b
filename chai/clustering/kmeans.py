"""K-means of many small problems from the distances between their points, compiled by Numba.

The start is Ward's clustering. Then single points change clusters while that lowers the inertia (Hartigan and Wong,
1979), which also improves on fixed points of Lloyd's iterations. On attention features the inertia is no higher than
that of the best of ten k-means++ starts with Lloyd's iterations, and nothing is random. This takes thousands of steps
of a few numbers each; a PyTorch or NumPy operation, or a kernel launch, per step would take a hundred times longer.

Means are never computed: the squared distance of point i to the mean of a cluster c of n points is

    d(i, c) = sum_j D_ij / n - sum_jl D_jl / 2 n^2        (j, l over the members of c)

with the squared distances D between points. So features that are summed over samples are clustered by the sum of their
D. Results depend neither on the batch nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from chai.cpu import run_tasks

#: Costs within this relative difference are equal: ties are broken by the lowest index, not by rounding.
TIE = 1e-4
TASK_SIZE = 64  # problems of a task


def compiled(function: Callable) -> Callable[..., Any]:
    """Compile at the first call, release the GIL, and cache on disk if a cache directory is writable."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable cache directory
        return numba.njit(nogil=True)(function)


def pairwise_distances(points: np.ndarray) -> np.ndarray:
    """Compute squared distances between the points of each problem: ``[N, P, F]`` to ``[N, P, P]``, fp32.

    A trillionth of the extent is subtracted: points that differ by rounding alone then coincide.
    """
    distances = np.empty((*points.shape[:2], points.shape[1]), dtype=np.float32)
    _pairwise(points, distances)
    return distances


def cluster(
    distances: np.ndarray, counts: np.ndarray, *, nearest: bool, max_moves: int = 50
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cluster each problem into its own number of clusters.

    Args:
        distances: ``[N, P, P]`` fp32, squared.
        counts: ``[N]``, k of each problem, ``1 <= k <= P``.
        nearest: The representative is the member nearest the mean (ties broken by lowest index), else the first member.
        max_moves: Limit of the moves of single points, for each problem.

    Returns:
        labels ``[N, P]`` (clusters numbered by their representatives), representatives ``[N, k_max]`` (ascending,
        padded with P), inertia ``[N]`` (sum of squared distances to the mean of the own cluster).
    """
    problems, size, _ = distances.shape
    if not 1 <= counts.min(initial=1) <= counts.max(initial=1) <= size:
        raise ValueError(
            f"{size} points cannot have {', '.join(map(str, np.unique(counts)))} clusters; valid: 1 to {size}"
        )
    labels = np.empty((problems, size), dtype=np.int64)
    representatives = np.full((problems, counts.max(initial=1)), size, dtype=np.int64)
    inertia = np.empty(problems)
    arrays = (distances, counts, labels, representatives, inertia)
    _run_slices(problems, lambda part: _cluster(*(array[part] for array in arrays), nearest, max_moves))
    return labels, representatives, inertia


def represent(
    distances: np.ndarray, counts: np.ndarray, labels: np.ndarray, *, nearest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the representatives of given clusters; arguments and result as in :func:`cluster`, without the inertia."""
    labels = labels.astype(np.int64)  # a copy
    representatives = np.full((len(labels), counts.max(initial=1)), labels.shape[1], dtype=np.int64)
    _represent(distances, counts, nearest, labels, representatives)
    return labels, representatives


def sweep(distances: np.ndarray, *, max_moves: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Cluster each problem into 1 to P clusters; Ward's clustering is computed once for all k.

    From squared distances ``[N, P, P]`` to inertia ``[N, P]`` and labels ``[N, P, P]`` (uint8), those of k clusters at
    index ``k - 1``.
    """
    problems, size, _ = distances.shape
    inertia = np.empty((problems, size))
    labels = np.empty((problems, size, size), dtype=np.uint8)
    distances = np.ascontiguousarray(distances, dtype=np.float32)
    _run_slices(problems, lambda part: _sweep(distances[part], max_moves, inertia[part], labels[part]))
    return inertia, labels


def _run_slices(problems: int, run: Callable[[slice], None]) -> None:
    """Run slices of the problems on all cores."""
    if problems <= TASK_SIZE:
        run(slice(None))
        return

    def work(tasks: Iterator[slice]) -> None:
        for part in tasks:
            run(part)

    run_tasks(work, [slice(begin, begin + TASK_SIZE) for begin in range(0, problems, TASK_SIZE)])


# The compiled core. Arrays of one problem of P points: distances [P, P], labels [P]; of its k clusters: sums [P, P]
# (of the distances of each point to the members of each cluster), sizes [P], inertias [P].


@compiled
def _cluster(distances, counts, labels, representatives, inertia, nearest, max_moves):  # type: ignore[no-untyped-def]
    size = distances.shape[1]
    sums, sizes, inertias = np.empty((size, size)), np.empty(size), np.empty(size)
    for problem in range(len(distances)):
        row, k = labels[problem], counts[problem]
        targets, merged = _ward(distances[problem], k)
        _cut(targets, merged, k, row)
        _summarize(distances[problem], row, k, sums, sizes, inertias)
        _exchange(distances[problem], k, max_moves, row, sums, sizes, inertias)
        inertia[problem] = inertias[:k].sum()
        _number(row, k, sums, inertias, nearest, representatives[problem])


@compiled
def _represent(distances, counts, nearest, labels, representatives):  # type: ignore[no-untyped-def]
    size = distances.shape[1]
    sums, sizes, inertias = np.empty((size, size)), np.empty(size), np.empty(size)
    for problem in range(len(distances)):
        row, k = labels[problem], counts[problem]
        _summarize(distances[problem], row, k, sums, sizes, inertias)
        _number(row, k, sums, inertias, nearest, representatives[problem])


@compiled
def _sweep(distances, max_moves, inertia, labels):  # type: ignore[no-untyped-def]
    size = distances.shape[1]
    sums, sizes, inertias = np.empty((size, size)), np.empty(size), np.empty(size)
    row = np.empty(size, dtype=np.int64)
    for problem in range(len(distances)):
        targets, merged = _ward(distances[problem], 1)
        for k in range(1, size + 1):
            _cut(targets, merged, k, row)
            _summarize(distances[problem], row, k, sums, sizes, inertias)
            _exchange(distances[problem], k, max_moves, row, sums, sizes, inertias)
            inertia[problem, k - 1] = inertias[:k].sum()
            labels[problem, k - 1] = row


@compiled
def _pairwise(points, distances):  # type: ignore[no-untyped-def]
    problems, size, features = points.shape
    for problem in range(problems):
        rows, out = points[problem], distances[problem]
        # Extent: the largest squared distance to the first point.
        extent = 0.0
        for i in range(size):
            square = 0.0
            for f in range(features):
                square += (np.float64(rows[i, f]) - rows[0, f]) ** 2
            extent = max(extent, square)
        for i in range(size):
            out[i, i] = 0
            for j in range(i):
                square = 0.0
                for f in range(features):
                    square += (np.float64(rows[i, f]) - rows[j, f]) ** 2
                out[i, j] = out[j, i] = max(square - 1e-12 * extent, 0.0)


@compiled
def _ward(distances, least):  # type: ignore[no-untyped-def]
    """Merge single points down to ``least`` clusters, each time the pair that adds the least inertia.

    Returns, for each merge, the cluster that stays and the one that joins it.
    """
    size = len(distances)
    added = distances.astype(np.float64) / 2
    sizes, active = np.ones(size), np.ones(size, dtype=np.bool_)
    targets, merged = np.empty(size - least, dtype=np.int64), np.empty(size - least, dtype=np.int64)
    for merge in range(size - least):
        # Find the cheapest pair.
        best, first, second = np.inf, -1, -1
        for i in range(size):
            if active[i]:
                for j in range(i + 1, size):
                    if active[j] and (added[i, j] < best or first < 0):
                        best, first, second = added[i, j], i, j
        targets[merge], merged[merge] = first, second
        # Update the inertia that merging with the new cluster adds (Lance and Williams, 1967).
        joint_size = sizes[first] + sizes[second]
        active[second] = False
        for i in range(size):
            if active[i] and i != first:
                joint = (sizes[i] + sizes[first]) * added[i, first] + (sizes[i] + sizes[second]) * added[i, second]
                joint = (joint - sizes[i] * best) / (sizes[i] + joint_size)
                added[i, first] = added[first, i] = joint
        sizes[first] = joint_size
    return targets, merged


@compiled
def _cut(targets, merged, k, labels):  # type: ignore[no-untyped-def]
    """Set the labels for ``k`` clusters left, numbered by their first points."""
    size = len(labels)
    for i in range(size):
        labels[i] = i
    for merge in range(size - k - 1, -1, -1):  # backwards: the label of a target is then final
        labels[merged[merge]] = labels[targets[merge]]
    number, free = np.full(size, -1), 0
    for i in range(size):
        if number[labels[i]] < 0:
            number[labels[i]] = free
            free += 1
        labels[i] = number[labels[i]]


@compiled
def _summarize(distances, labels, k, sums, sizes, inertias):  # type: ignore[no-untyped-def]
    sums[:k], sizes[:k] = 0, 0
    for j in range(len(labels)):
        sizes[labels[j]] += 1
        sums[labels[j]] += distances[j]
    for c in range(k):
        _set_inertia(c, labels, sums, sizes, inertias)


@compiled
def _set_inertia(c, labels, sums, sizes, inertias):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(labels)):
        if labels[i] == c:
            total += sums[c, i]
    inertias[c] = total / (2 * sizes[c])


@compiled
def _exchange(distances, k, max_moves, labels, sums, sizes, inertias):  # type: ignore[no-untyped-def]
    """Move single points, each time the one that lowers the inertia most, until none lowers it by ``TIE`` of its part.

    A point at squared distance d from the mean adds ``n d / (n + 1)`` to a cluster of n that it joins, and removes
    ``n d / (n - 1)`` from the one that it leaves.
    """
    size = len(labels)
    change = np.empty((k, size))
    for _ in range(max_moves):
        # Inertia gained by each move of a point i to a cluster c.
        least = 0.0
        for i in range(size):
            old = labels[i]
            removed = 0.0  # a cluster of one point stays
            if sizes[old] > 1:
                removed = abs(sums[old, i] - inertias[old]) / (sizes[old] - 1)
            for c in range(k):
                change[c, i] = np.inf
                if c != old and removed > 0:
                    change[c, i] = abs(sums[c, i] - inertias[c]) / ((1 - TIE) * (sizes[c] + 1)) - removed
                    least = min(least, change[c, i])
        if least >= 0:
            return
        # Ties are broken by lowest index.
        move = -1
        for index in range(k * size):
            if change[index // size, index % size] <= (1 - TIE) * least:
                move = index
                break
        c, i = move // size, move % size
        old = labels[i]
        sums[old] -= distances[i]
        sums[c] += distances[i]
        sizes[old] -= 1
        sizes[c] += 1
        labels[i] = c
        _set_inertia(old, labels, sums, sizes, inertias)
        _set_inertia(c, labels, sums, sizes, inertias)


@compiled
def _number(labels, k, sums, inertias, nearest, representatives):  # type: ignore[no-untyped-def]
    """Choose the representatives, and number the clusters by them."""
    heads, rank = np.empty(k, dtype=np.int64), np.empty(k, dtype=np.int64)
    for c in range(k):
        heads[c] = _representative(c, labels, sums, inertias, nearest)
    for c in range(k):
        rank[c] = (heads < heads[c]).sum()
    for c in range(k):
        representatives[rank[c]] = heads[c]
    for i in range(len(labels)):
        labels[i] = rank[labels[i]]


@compiled
def _representative(c, labels, sums, inertias, nearest):  # type: ignore[no-untyped-def]
    """Return the member nearest the mean (ties broken by lowest index), or the first member."""
    least = np.inf
    for i in range(len(labels)):
        if labels[i] == c:
            least = min(least, abs(sums[c, i] - inertias[c]))
    for i in range(len(labels)):
        if labels[i] == c and (not nearest or abs(sums[c, i] - inertias[c]) <= least * (1 + TIE) + 1e-12):
            return i
    return -1
