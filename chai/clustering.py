"""Which heads belong together: features of a head, batched k-means, representatives (paper, sections 3.2 to 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        if len(self.assignment) != len(self.representatives) or self.k > self.heads:
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


def kmeans(
    points: Tensor, k: int, *, seed: int = 0, restarts: int = 10, iterations: int = 50
) -> tuple[Tensor, Tensor, Tensor]:
    """K-means of many small problems at once: k-means++ starts, Lloyd's iterations, the best of several restarts.

    Each problem draws the same random numbers, so its result depends neither on its place in the batch nor on its
    neighbours. Every cluster gets at least one point, also where points coincide.

    Args:
        points: ``[N, P, F]``, ``N`` problems of ``P`` points.
        k: clusters, ``1 <= k <= P``.
        seed: of the k-means++ starts.
        restarts: independent starts; the one with the least inertia wins (within 0.01 %, the first).
        iterations: at most so many of Lloyd's iterations.

    Returns:
        labels ``[N, P]``, centroids ``[N, k, F]``, inertia ``[N]`` (sum of squared distances to the own centroid).

    Raises:
        ValueError: ``k`` outside ``[1, P]``.
    """
    problems, count, width = points.shape
    if not 1 <= k <= count:
        raise ValueError(f"k-means of {count} points can't have {k} clusters: choose 1 to {count}")
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(restarts, k, generator=generator, dtype=torch.float64)
    tiled = points.repeat_interleave(restarts, 0)  # [N * R, P, F]
    centroids = _plus_plus(tiled, uniforms.repeat(problems, 1).to(points.device))
    labels = _nearest(tiled, centroids)
    for _ in range(iterations):
        centroids = _means(tiled, labels, centroids)
        previous, labels = labels, _nearest(tiled, centroids)
        if torch.equal(previous, labels):
            break
    labels = _fill_empty(tiled, labels, centroids)
    centroids = _means(tiled, labels, centroids)
    inertia = (tiled - centroids.gather(1, labels[..., None].expand(-1, -1, width))).square().sum((1, 2))
    best = _first_least(inertia.view(problems, restarts)) + torch.arange(problems, device=points.device) * restarts
    return labels[best], centroids[best], inertia[best]


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Label of the nearest centroid ``[M, P]``; by products, which is several times faster than by differences."""
    return (centroids.square().sum(-1)[:, None] - 2 * points @ centroids.transpose(1, 2)).argmin(-1)


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """``[M, P, F]`` and ``[M, k, F]`` to ``[M, P, k]``; by differences, for coinciding points must be at exactly 0."""
    return (points[:, :, None] - centroids[:, None]).square().sum(-1)


def _plus_plus(points: Tensor, uniforms: Tensor) -> Tensor:
    """k-means++ starting centroids ``[M, k, F]``: distinct points, drawn with probability ~ squared distance."""
    width = points.shape[-1]
    taken = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    nearest = torch.full(points.shape[:2], torch.inf, dtype=torch.float64, device=points.device)
    chosen = []
    for step in range(uniforms.shape[1]):
        weights = torch.ones_like(nearest) if step == 0 else nearest + 1e-30  # coinciding points stay drawable
        cumulative = weights.masked_fill(taken, 0.0).cumsum(1)
        target = uniforms[:, step, None] * cumulative[:, -1:]
        index = (cumulative > target).to(torch.uint8).argmax(1)  # the first point whose share holds the target
        chosen.append(index)
        taken.scatter_(1, index[:, None], True)
        centre = points.gather(1, index[:, None, None].expand(-1, 1, width))
        nearest = torch.minimum(nearest, (points - centre).square().sum(-1).double())
    return points.gather(1, torch.stack(chosen, 1)[..., None].expand(-1, -1, width))


def _means(points: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """Mean of each cluster's points ``[M, k, F]``; an empty cluster keeps its previous centroid."""
    members = torch.nn.functional.one_hot(labels, previous.shape[1]).to(points)  # [M, P, k]
    sizes = members.sum(1)[..., None]
    return torch.where(sizes > 0, members.transpose(1, 2) @ points / sizes.clamp(min=1), previous)


def _fill_empty(points: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Give each empty cluster the point farthest from its own centroid, taken from a cluster of two or more."""
    k = centroids.shape[1]
    labels = labels.clone()
    while True:
        sizes = torch.nn.functional.one_hot(labels, k).sum(1)  # [M, k]
        empty = sizes == 0
        problem = empty.any(1).nonzero().squeeze(1)
        if len(problem) == 0:
            return labels
        distance = _squared_distances(points[problem], centroids[problem]).gather(2, labels[problem, :, None])[..., 0]
        movable = sizes[problem].gather(1, labels[problem]) > 1
        farthest = distance.masked_fill(~movable, -1.0).argmax(1)
        labels[problem, farthest] = empty[problem].to(torch.uint8).argmax(1)


def _first_least(cost: Tensor) -> Tensor:
    """Index of the least non-negative cost along the last axis; among those within 0.01 % of it, the first.

    Both heads of a cluster of two are equally far from its mean, so without this rounding would choose between them,
    and a prompt that comes in two calls could get another representative than the same prompt in one.
    """
    least = cost.amin(-1, keepdim=True)
    return (cost <= least * (1 + 1e-4) + 1e-12).to(torch.uint8).argmax(-1)


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
    members = torch.nn.functional.one_hot(labels, k).bool().transpose(1, 2)  # [N, k, H]
    if rule == "nearest":
        centroids = _means(points, labels, points.new_zeros(len(points), k, points.shape[-1]))
        cost = _squared_distances(points, centroids).transpose(1, 2)  # [N, k, H]
    else:
        cost = torch.arange(labels.shape[1], device=labels.device, dtype=points.dtype).expand(members.shape)
    representatives, order = _first_least(cost.masked_fill(~members, torch.inf)).sort(1)
    return HeadClusters(order.argsort(1).gather(1, labels), representatives)
