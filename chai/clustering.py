"""Which heads belong together: features of a head, batched k-means, representatives (paper, sections 3.2 to 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, comb
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Representative = Literal["nearest", "lowest"]


@dataclass(frozen=True)
class HeadClusters:
    """The membership of one layer, row by row of the batch.

    Attributes:
        assignment: ``[B, H]`` (long); ``assignment[b, h]`` in ``[0, k)`` is the cluster of head ``h`` in row ``b``.
        representatives: ``[B, k]`` (long); ``representatives[b, c]`` is a head of cluster ``c`` in row ``b``.

    Raises:
        ValueError: the two don't have these shapes.
    """

    assignment: Tensor
    representatives: Tensor

    def __post_init__(self) -> None:
        if self.assignment.ndim != 2 or self.representatives.ndim != 2:
            raise ValueError("assignment must be [B, H] and representatives [B, k]")
        if self.assignment.shape[0] != self.representatives.shape[0] or self.k > self.heads:
            raise ValueError(
                f"assignment {tuple(self.assignment.shape)} and representatives "
                f"{tuple(self.representatives.shape)} don't fit: one row each, at most H representatives"
            )

    @property
    def heads(self) -> int:
        """H, the number of query heads."""
        return self.assignment.shape[1]

    @property
    def k(self) -> int:
        """The number of clusters."""
        return self.representatives.shape[1]

    def check(self) -> None:
        """Verify the contract on the values themselves (reads the tensors, so not for the hot path).

        Raises:
            ValueError: a label outside ``[0, k)``, or a representative that isn't a member of its own cluster.
        """
        if not bool(((self.assignment >= 0) & (self.assignment < self.k)).all()):
            raise ValueError(f"assignment has labels outside [0, {self.k})")
        if not bool(((self.representatives >= 0) & (self.representatives < self.heads)).all()):
            raise ValueError(f"representatives has heads outside [0, {self.heads})")
        labels = torch.arange(self.k, device=self.assignment.device).expand_as(self.representatives)
        if not torch.equal(self.assignment.gather(1, self.representatives), labels):
            raise ValueError("a representative isn't a member of the cluster it stands for")


def head_features(query: Tensor, key: Tensor, scaling: float, causal: bool = True) -> Tensor:
    """What each head attends to among the first tokens, as one vector a head.

    Equation: ``softmax(scaling * Q_h K_h^T)`` of the first ``t`` tokens, flattened; with ``causal`` a token sees only
    itself and those before it. The authors' release leaves the mask out (``causal=False``).

    Args:
        query: ``[B, H, t, D]``, after rotary embedding.
        key: ``[B, H, t, D]``, after rotary embedding.
        scaling: what the model multiplies the scores by.
        causal: mask later tokens.

    Returns:
        ``[B, H, t * t]`` in fp32.
    """
    scores = (query.float() @ key.float().transpose(-1, -2)) * scaling
    if causal:
        size = scores.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1).flatten(-2)


def kmeans(points: Tensor, k: int | Tensor, *, iterations: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """K-means of many small problems at once, each with its own number of clusters.

    Ward's clustering is the start. Then points change clusters, one at a time, while that lowers the inertia, which
    goes on where Lloyd's iterations stand still (Hartigan and Wong, 1979). On attention features this ends no higher
    than the best of ten k-means++ starts does with Lloyd's iterations, and nothing is drawn. It takes hundreds of tiny
    steps; hence NumPy on the CPU, whatever the device: a call of PyTorch's, or a launch on a GPU, takes much longer.

    Each problem's result depends neither on its place in the batch nor on its neighbours. Every cluster gets at least
    one point, also where points coincide.

    Args:
        points: ``[N, P, F]``, ``N`` problems of ``P`` points.
        k: clusters, ``1 <= k <= P``; one number, or long ``[N]`` with one for each problem.
        iterations: at most so many times a point of a problem changes clusters.

    Returns:
        labels ``[N, P]`` (long), centroids ``[N, k_max, F]`` (zeros beyond a problem's own k), inertia ``[N]`` (sum of
        squared distances to the own centroid).

    Raises:
        ValueError: ``k`` outside ``[1, P]``.
    """
    problems, count, _ = points.shape
    counts = np.full(problems, k) if isinstance(k, int) else k.cpu().numpy()
    for wrong in counts[(counts < 1) | (counts > count)]:
        raise ValueError(f"k-means of {count} points can't have {wrong} clusters: choose 1 to {count}")
    rows = _to_numpy(points)
    distances = _distances(rows)
    labels = _exchange(distances, counts, _ward(distances, counts), iterations)
    members = _members(labels, counts.max())
    centroids = (members @ rows) / np.maximum(members.sum(-1, keepdims=True), 1)
    inertia = np.square(rows - centroids[np.arange(problems)[:, None], labels]).sum((1, 2))
    return (
        torch.from_numpy(labels).to(points.device),
        torch.from_numpy(centroids).to(points),
        torch.from_numpy(inertia).to(points),
    )


def _to_numpy(points: Tensor) -> np.ndarray:
    """In fp32, on the CPU."""
    return points.detach().cpu().float().numpy()


def _distances(points: np.ndarray) -> np.ndarray:
    """Squared distances ``[N, P, P]`` between the points of each problem, less a trillionth of its extent.

    So points that differ by rounding alone coincide, and rounding doesn't decide between them.
    """
    points = points.astype(np.float64)  # products cancel
    points -= points[:, :1].copy()
    squares = np.einsum("npf,npf->np", points, points)
    squares -= 5e-13 * squares.max(1, keepdims=True)
    distances = points @ np.ascontiguousarray(points.swapaxes(1, 2))
    distances *= -2
    distances += squares[:, :, None]
    distances += squares[:, None]
    return np.maximum(distances.astype(np.float32), 0)


def _members(labels: np.ndarray, k: int) -> np.ndarray:
    """``[N, P]`` to ``[N, k, P]``: 1.0 where the point is in the cluster, else 0.0."""
    return (labels.astype(np.int16)[:, None] == np.arange(k, dtype=np.int16)[:, None]).astype(np.float32)


def _excess(distances: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances to the means of clusters of n points, times n, without the means.

    Equation: ``n d(i, c) = sum_j D_ij - sum_jl D_jl / 2 n`` with ``j`` and ``l`` over the members of ``c``.

    Args:
        distances: ``[N, P, P]``, squared.
        members: ``[N, k, P]``, 1 or 0.

    Returns:
        ``[N, k, P]``, infinite for a cluster without members, and n ``[N, k, 1]``.
    """
    sums = members @ distances
    sizes = members @ np.ones((members.shape[-1], 1), dtype=np.float32)
    within = np.einsum("ncp,ncp->nc", members, sums)[..., None] / np.maximum(2 * sizes, 1)
    within[sizes == 0] = -np.inf
    sums -= within
    return np.abs(sums, out=sums), sizes  # rounding may have made a zero negative


def _ward(distances: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Labels ``[N, P]`` of Ward's clustering: from single points, the merge that adds the least inertia is next."""
    problems, count, _ = distances.shape
    rows, points = np.arange(problems), np.arange(count)
    sizes = np.ones((problems, count), dtype=np.float32)
    added = distances / 2
    added[:, points, points] = np.inf
    merges = np.empty((2, count - counts.min(), problems), dtype=np.int64)
    for merge in merges.swapaxes(0, 1):
        kept, gone = merge[:] = np.divmod(added.reshape(problems, -1).argmin(1), count)
        # Lance and Williams' update: what a merge with the new cluster would add.
        size, other = sizes[rows, kept, None], sizes[rows, gone, None]
        to_kept, to_gone, least = added[rows, kept], added[rows, gone], added[rows, kept, gone, None]
        both = size + other
        merged = (sizes * (to_kept + to_gone - least) + size * to_kept + other * to_gone) / (sizes + both)
        sizes[rows, kept] = both[:, 0]
        added[rows, kept] = added[rows, :, kept] = merged
        added[rows, gone] = added[rows, :, gone] = np.inf
    step, problem = (np.arange(len(merges[0]))[:, None] < count - counts).nonzero()
    kept, gone = merges[:, step, problem]
    parents = np.tile(points, (problems, 1))
    parents[problem, gone] = kept
    for _ in range(int(count).bit_length()):
        parents = parents[rows[:, None], parents]
    return ((parents == points).cumsum(1) - 1)[rows[:, None], parents]


def _exchange(distances: np.ndarray, counts: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """Move one point after the other to where it lowers its problem's inertia most, until none does by 0.01 %.

    A point at squared distance d from the mean adds ``n d / (n + 1)`` to a cluster of n that it joins, and takes
    ``n d / (n - 1)`` from one that it leaves.

    Args:
        distances: ``[N, P, P]``, squared.
        counts: ``[N]``.
        labels: ``[N, P]``, no cluster empty; changed in place.
        most: moves in a problem.
    """
    points = np.arange(labels.shape[1])
    busy = np.arange(len(labels))
    for _ in range(most):
        own = labels[busy]
        place = np.arange(len(busy))[:, None], own, points
        excess, sizes = _excess(distances[busy], _members(own, counts[busy].max()))
        leave = excess[place] / np.maximum(sizes[place[:2]][..., 0] - 1, 1)  # 0 for a single point, which stays
        excess /= (1 - 1e-4) * (sizes + 1)
        excess -= leave[:, None]
        excess[place] = np.inf
        change = excess.reshape(len(busy), -1)
        least = change.min(1)
        better = least < 0
        if not better.any():
            break
        near = change[better] <= (1 - 1e-4) * least[better, None]  # among gains that are equal but for rounding,
        busy, best = busy[better], near.argmax(1)  # the first
        labels[busy, best % len(points)] = best // len(points)
    return labels


def _about(cost: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Where a cost, which isn't negative, is the least or within 0.01 % of it; of these, the first is to be taken.

    Both heads of a cluster of two are equally far from its mean, so without this rounding would choose between them,
    and a prompt that comes in two calls could get another representative than the same prompt in one.
    """
    return cost <= least * (1 + 1e-4) + 1e-12


def _first_least(cost: np.ndarray) -> np.ndarray:
    """Index of the first least cost along the last axis."""
    return _about(cost, cost.min(-1, keepdims=True)).argmax(-1)


def agglomerative(points: Tensor, k: int) -> Tensor:
    """Average-linkage clustering on the cosine distance, as in the authors' release.

    Args:
        points: ``[N, P, F]``.
        k: clusters.

    Returns:
        labels ``[N, P]``.
    """
    from sklearn.cluster import AgglomerativeClustering

    model = AgglomerativeClustering(n_clusters=k, metric="cosine", linkage="average")
    labels = [torch.from_numpy(model.fit_predict(row)) for row in points.double().cpu().numpy()]
    return torch.stack(labels).long().to(points.device)


def choose_representatives(points: Tensor, labels: Tensor, k: int, rule: Representative = "nearest") -> HeadClusters:
    """One head of each cluster to compute for all its members.

    ``nearest`` takes the member nearest the cluster's mean (within 0.01 %: the lowest head), ``lowest`` the
    lowest head.
    Clusters are numbered by their representative, so equal memberships have equal tensors.

    Args:
        points: ``[N, H, F]``, the heads' features.
        labels: ``[N, H]``, each label in ``[0, k)`` used at least once.
        k: clusters.
        rule: which member.
    """
    return layer_clusters(points[None], labels[None], [k], rule)[0]


def layer_clusters(
    points: Tensor, labels: Tensor, counts: Sequence[int], rule: Representative = "nearest"
) -> list[HeadClusters]:
    """:func:`choose_representatives` for layers that differ in their number of clusters, all at once.

    Args:
        points: ``[L, B, H, F]``, the heads' features.
        labels: ``[L, B, H]``; in layer ``l`` each label in ``[0, counts[l])`` used at least once.
        counts: clusters of each layer.
        rule: which member.

    Returns:
        the memberships of the ``L`` layers.
    """
    own = labels.flatten(0, 1).cpu().numpy()
    problems, heads = own.shape
    place = np.arange(problems)[:, None], own
    near = np.ones(own.shape, dtype=bool)
    if rule == "nearest":
        excess, _ = _excess(_distances(_to_numpy(points.flatten(0, 1))), _members(own, max(counts)))
        cost = excess[place[0], own, np.arange(heads)]
        least = np.full(excess.shape[:2], np.inf, dtype=excess.dtype)
        np.minimum.at(least, place, cost)
        near = _about(cost, least[place])
    representatives = np.full((problems, max(counts)), heads)
    np.minimum.at(representatives, place, np.where(near, np.arange(heads), heads))
    order = representatives.argsort(1)
    assignment = order.argsort(1)[place]
    return _split(assignment, np.take_along_axis(representatives, order, 1), counts, labels.device)


def _split(
    assignment: np.ndarray, representatives: np.ndarray, counts: Sequence[int], device: torch.device
) -> list[HeadClusters]:
    """The memberships of each layer from ``[L * B, H]`` and ``[L * B, k_max]``, filled up with H."""
    heads = assignment.shape[1]
    rows = len(assignment) // len(counts)
    used = torch.from_numpy(representatives[representatives < heads]).to(device).split([rows * k for k in counts])
    assignments = torch.from_numpy(assignment).to(device).split(rows)
    return [HeadClusters(own, flat.view(rows, k)) for own, flat, k in zip(assignments, used, counts, strict=True)]


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
    distances = _distances(_to_numpy(points.flatten(0, 1)))
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
    return _split(assignment, representatives, counts, points.device)


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
