"""K-means of many small problems, from the distances between their points alone, compiled by Numba.

Ward's clustering is the start. Then points change clusters, one at a time, while that lowers the inertia, which goes
on where Lloyd's iterations stand still (Hartigan and Wong, 1979). On attention features this ends no higher than the
best of ten k-means++ starts does with Lloyd's iterations, and nothing is drawn. It takes thousands of steps of a few
numbers each, for which an operation of PyTorch's or NumPy's, or a launch on a GPU, would take a hundred times longer.

Means never appear: the squared distance of point i to the mean of a cluster c of n points is

    d(i, c) = sum_j D_ij / n - sum_jl D_jl / 2 n^2        (j, l over the members of c)

with the squared distances D between points. So whatever adds up over samples needs only its D to be clustered.
Results depend on neither the batch nor the threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from chai.kernels.workers import run_tasks

#: Relative difference below which two costs are the same: rounding doesn't choose between them, the order does.
TIE = 1e-4
AT_ONCE = 64  # problems of a task


def compiled(function: Callable) -> Callable[..., Any]:
    """Compiled when first called, without the interpreter's lock; kept on disk where there is a place to write."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's own cache
        return numba.njit(nogil=True)(function)


def cluster(distances: np.ndarray, counts: np.ndarray, *, nearest: bool, most: int = 50) -> tuple[np.ndarray, ...]:
    """One number of clusters for each problem.

    Args:
        distances: ``[N, P, P]`` fp32, squared.
        counts: ``[N]``, k of each, ``1 <= k <= P``.
        nearest: a cluster's representative is the member nearest its mean (of equals the first), else its first.
        most: times that a point of a problem may change clusters.

    Returns:
        labels ``[N, P]`` (clusters numbered by their representatives), representatives ``[N, k_max]`` (ascending,
        filled up with P), inertia ``[N]`` (sum of squared distances to the own mean).
    """
    problems, count, _ = distances.shape
    labels = np.empty((problems, count), dtype=np.int64)
    representatives = np.full((problems, counts.max(initial=1)), count, dtype=np.int64)
    inertia = np.empty(problems)

    def some(own: slice) -> None:
        _cluster(distances[own], counts[own], nearest, most, labels[own], representatives[own], inertia[own])

    _split(problems, some)
    return labels, representatives, inertia


def represent(
    distances: np.ndarray, counts: np.ndarray, labels: np.ndarray, *, nearest: bool
) -> tuple[np.ndarray, ...]:
    """Representatives of clusters that are known; arguments and result as in :func:`cluster`, without the inertia."""
    labels = labels.astype(np.int64)  # a copy
    representatives = np.full((len(labels), counts.max(initial=1)), labels.shape[1], dtype=np.int64)
    _represent(distances, counts, nearest, labels, representatives)
    return labels, representatives


def sweep(distances: np.ndarray, *, most: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Every number of clusters for each problem; Ward's clustering is made once for all.

    Args:
        distances: ``[N, P, P]``, squared.
        most: as in :func:`cluster`.

    Returns:
        inertia ``[N, P]``, with k clusters at ``k - 1``; labels ``[N, P, P]`` (uint8), likewise.
    """
    problems, count, _ = distances.shape
    inertia = np.empty((problems, count))
    labels = np.empty((problems, count, count), dtype=np.uint8)
    distances = np.ascontiguousarray(distances, dtype=np.float32)

    def some(own: slice) -> None:
        _sweep(distances[own], most, inertia[own], labels[own])

    _split(problems, some)
    return inertia, labels


def _split(problems: int, some: Callable[[slice], None]) -> None:
    """Every problem, on all cores where there are many."""

    def work(tasks: Iterator[slice]) -> None:
        for own in tasks:
            some(own)

    parts = [slice(begin, begin + AT_ONCE) for begin in range(0, problems, AT_ONCE)]
    work(iter(parts)) if len(parts) < 2 else run_tasks(work, parts)


@compiled
def _cluster(distances, counts, nearest, most, labels, representatives, inertia):  # type: ignore[no-untyped-def]
    count = distances.shape[1]
    sums, sizes, within = np.empty((count, count)), np.empty(count), np.empty(count)
    for problem in range(len(distances)):
        own, k = labels[problem], counts[problem]
        kept, gone = _ward(distances[problem], k)
        _cut(kept, gone, k, own)
        _summarize(distances[problem], own, k, sums, sizes, within)
        _exchange(distances[problem], k, most, own, sums, sizes, within)
        inertia[problem] = within[:k].sum()
        _number(own, k, sums, within, nearest, representatives[problem])


@compiled
def _represent(distances, counts, nearest, labels, representatives):  # type: ignore[no-untyped-def]
    count = distances.shape[1]
    sums, sizes, within = np.empty((count, count)), np.empty(count), np.empty(count)
    for problem in range(len(distances)):
        own, k = labels[problem], counts[problem]
        _summarize(distances[problem], own, k, sums, sizes, within)
        _number(own, k, sums, within, nearest, representatives[problem])


@compiled
def pairwise(points, distances):  # type: ignore[no-untyped-def]
    """Fill ``distances`` ``[N, P, P]``; see :func:`chai.clustering.pairwise_distances`."""
    problems, count, size = points.shape
    for problem in range(problems):
        own, found = points[problem], distances[problem]
        extent = 0.0
        for i in range(count):
            square = 0.0
            for f in range(size):
                square += (np.float64(own[i, f]) - own[0, f]) ** 2
            extent = max(extent, square)
        for i in range(count):
            found[i, i] = 0
            for j in range(i):
                square = 0.0
                for f in range(size):
                    square += (np.float64(own[i, f]) - own[j, f]) ** 2
                found[i, j] = found[j, i] = max(square - 1e-12 * extent, 0.0)


@compiled
def _sweep(distances, most, inertia, labels):  # type: ignore[no-untyped-def]
    count = distances.shape[1]
    sums, sizes, within = np.empty((count, count)), np.empty(count), np.empty(count)
    own = np.empty(count, dtype=np.int64)
    for problem in range(len(distances)):
        kept, gone = _ward(distances[problem], 1)
        for k in range(1, count + 1):
            _cut(kept, gone, k, own)
            _summarize(distances[problem], own, k, sums, sizes, within)
            _exchange(distances[problem], k, most, own, sums, sizes, within)
            inertia[problem, k - 1] = within[:k].sum()
            labels[problem, k - 1] = own


@compiled
def _ward(distances, least):  # type: ignore[no-untyped-def]
    """The merges, from single points down to ``least`` clusters, that each add the least inertia."""
    count = len(distances)
    added = distances.astype(np.float64) / 2
    sizes, active = np.ones(count), np.ones(count, dtype=np.bool_)
    kept, gone = np.empty(count - least, dtype=np.int64), np.empty(count - least, dtype=np.int64)
    for merge in range(count - least):
        best, first, second = np.inf, -1, -1
        for i in range(count):
            if active[i]:
                for j in range(i + 1, count):
                    if active[j] and (added[i, j] < best or first < 0):
                        best, first, second = added[i, j], i, j
        kept[merge], gone[merge] = first, second
        both = sizes[first] + sizes[second]
        active[second] = False
        for i in range(count):
            if active[i] and i != first:  # Lance and Williams' update
                merged = (sizes[i] + sizes[first]) * added[i, first] + (sizes[i] + sizes[second]) * added[i, second]
                merged = (merged - sizes[i] * best) / (sizes[i] + both)
                added[i, first] = added[first, i] = merged
        sizes[first] = both
    return kept, gone


@compiled
def _cut(kept, gone, k, labels):  # type: ignore[no-untyped-def]
    """Labels with ``k`` clusters left, numbered by their first points."""
    count = len(labels)
    for i in range(count):
        labels[i] = i
    for merge in range(count - k - 1, -1, -1):  # backwards, so that what joins a cluster knows where that ended
        labels[gone[merge]] = labels[kept[merge]]
    number, next_one = np.full(count, -1), 0
    for i in range(count):
        if number[labels[i]] < 0:
            number[labels[i]] = next_one
            next_one += 1
        labels[i] = number[labels[i]]


@compiled
def _summarize(distances, labels, k, sums, sizes, within):  # type: ignore[no-untyped-def]
    """``sums[c, i]``: of the distances of i to the members of c; ``within[c]``: its inertia."""
    sums[:k], sizes[:k] = 0, 0
    for j in range(len(labels)):
        sizes[labels[j]] += 1
        sums[labels[j]] += distances[j]
    for c in range(k):
        _inertia(c, labels, sums, sizes, within)


@compiled
def _inertia(c, labels, sums, sizes, within):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(labels)):
        if labels[i] == c:
            total += sums[c, i]
    within[c] = total / (2 * sizes[c])


@compiled
def _exchange(distances, k, most, labels, sums, sizes, within):  # type: ignore[no-untyped-def]
    """Move one point after the other to where it lowers the inertia most, until none does by ``TIE`` of its share.

    A point at squared distance d from the mean adds ``n d / (n + 1)`` to a cluster of n that it joins, and takes
    ``n d / (n - 1)`` from one that it leaves.
    """
    count = len(labels)
    change = np.empty((k, count))
    for _ in range(most):
        least = 0.0
        for i in range(count):
            own = labels[i]
            leave = 0.0  # a single point stays
            if sizes[own] > 1:
                leave = abs(sums[own, i] - within[own]) / (sizes[own] - 1)
            for c in range(k):
                change[c, i] = np.inf
                if c != own and leave > 0:
                    change[c, i] = abs(sums[c, i] - within[c]) / ((1 - TIE) * (sizes[c] + 1)) - leave
                    least = min(least, change[c, i])
        if least >= 0:
            return
        found = -1  # among gains that are equal but for rounding, the first
        for place in range(k * count):
            if change[place // count, place % count] <= (1 - TIE) * least:
                found = place
                break
        c, i = found // count, found % count
        own = labels[i]
        sums[own] -= distances[i]
        sums[c] += distances[i]
        sizes[own] -= 1
        sizes[c] += 1
        labels[i] = c
        _inertia(own, labels, sums, sizes, within)
        _inertia(c, labels, sums, sizes, within)


@compiled
def _number(labels, k, sums, within, nearest, representatives):  # type: ignore[no-untyped-def]
    """Find the representatives, and number the clusters by them."""
    order, place = np.empty(k, dtype=np.int64), np.empty(k, dtype=np.int64)
    for c in range(k):
        order[c] = _representative(c, labels, sums, within, nearest)
    for c in range(k):
        place[c] = (order < order[c]).sum()
    for c in range(k):
        representatives[place[c]] = order[c]
    for i in range(len(labels)):
        labels[i] = place[labels[i]]


@compiled
def _representative(c, labels, sums, within, nearest):  # type: ignore[no-untyped-def]
    """The member nearest the mean (of equals the first), or the first."""
    least = np.inf
    for i in range(len(labels)):
        if labels[i] == c:
            least = min(least, abs(sums[c, i] - within[c]))
    for i in range(len(labels)):
        if labels[i] == c and (not nearest or abs(sums[c, i] - within[c]) <= least * (1 + TIE) + 1e-12):
            return i
    return -1
