"""Which heads belong together: features of a head, batched k-means, representatives (paper, sections 3.2 to 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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

    def repeated(self, rows: int, device: torch.device) -> HeadClusters:
        """The membership of one row for ``rows`` of them, on ``device``."""
        return HeadClusters(*(tensor.to(device).repeat(rows, 1) for tensor in (self.assignment, self.representatives)))

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
    rows = query.float().flatten(0, -3), key.float().flatten(0, -3)
    mask = _later_tokens(query.shape[-2], causal, query.device).expand(len(rows[0]), -1, -1)
    scores = torch.baddbmm(mask, rows[0], rows[1].transpose(1, 2), alpha=scaling)
    return scores.softmax(-1).view(*query.shape[:-2], -1)


@lru_cache(maxsize=16)
def _later_tokens(size: int, hidden: bool, device: torch.device) -> Tensor:
    """What is added to scores ``[size, size]``: minus infinity for later tokens where they are hidden."""
    with torch.inference_mode(False):  # kept for calls outside of it, too
        return torch.full((size, size), -torch.inf if hidden else 0.0, device=device).triu(1)


def kmeans(points: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K-means of many small problems at once, each with its own number of clusters (:mod:`chai.kernels.kmeans`).

    Nothing is drawn, and each problem's result depends neither on its place in the batch nor on its neighbours. Every
    cluster gets at least one point, also where points coincide.

    Args:
        points: ``[N, P, F]``, ``N`` problems of ``P`` points.
        k: clusters, ``1 <= k <= P``; one number, or long ``[N]`` with one for each problem.

    Returns:
        labels ``[N, P]`` (long), centroids ``[N, k_max, F]`` (zeros beyond a problem's own k), inertia ``[N]`` (sum of
        squared distances to the own centroid).

    Raises:
        ValueError: ``k`` outside ``[1, P]``.
    """
    from chai.kernels.kmeans import cluster

    problems, count, _ = points.shape
    counts = np.full(problems, k) if isinstance(k, int) else k.cpu().numpy()
    for wrong in counts[(counts < 1) | (counts > count)]:
        raise ValueError(f"k-means of {count} points can't have {wrong} clusters: choose 1 to {count}")
    found, _, inertia = cluster(pairwise_distances(points), counts, nearest=True)
    labels = torch.from_numpy(found).to(points.device)
    members = torch.nn.functional.one_hot(labels, int(counts.max())).to(points).transpose(1, 2)
    centroids = members @ points / members.sum(2, keepdim=True).clamp(min=1)
    return labels, centroids, torch.from_numpy(inertia).to(points)


def pairwise_distances(points: Tensor) -> np.ndarray:
    """Squared distances ``[N, P, P]`` (fp32) between the points of each problem, less a trillionth of its extent.

    So points that differ by rounding alone coincide, and rounding doesn't decide between them.
    """
    from chai.kernels.kmeans import pairwise

    rows = points.detach().cpu().float().numpy()
    distances = np.empty((*rows.shape[:2], rows.shape[1]), dtype=np.float32)
    pairwise(rows, distances)
    return distances


def cluster_layers(points: Tensor, counts: Sequence[int], rule: Representative = "nearest") -> list[HeadClusters]:
    """K-means of the heads of all layers and rows at once, with a representative for each cluster.

    Args:
        points: ``[L, B, H, F]``, the heads' features.
        counts: clusters of each layer.
        rule: which member represents a cluster; see :func:`represent_layers`.
    """
    from chai.kernels.kmeans import cluster

    distances = pairwise_distances(points.flatten(0, 1))
    labels, representatives, _ = cluster(distances, np.repeat(counts, points.shape[1]), nearest=rule == "nearest")
    return split_layers(labels, representatives, counts, points.device)


def represent_layers(
    points: Tensor, labels: Tensor, counts: Sequence[int], rule: Representative = "nearest"
) -> list[HeadClusters]:
    """One head of each cluster to compute for all its members, for clusters that are known.

    ``nearest`` takes the member nearest the cluster's mean (of those within 0.01 %, the lowest head), ``lowest`` the
    lowest head. Both heads of a cluster of two are equally far from its mean, so without this rounding would choose
    between them, and a prompt that comes in two calls could get another representative than the same prompt in one.
    Clusters are numbered by their representative, so equal memberships have equal tensors.

    Args:
        points: ``[L, B, H, F]``, the heads' features.
        labels: ``[L, B, H]``; in layer ``l`` each label in ``[0, counts[l])`` used at least once.
        counts: clusters of each layer.
        rule: which member.

    Returns:
        the memberships of the ``L`` layers.
    """
    from chai.kernels.kmeans import represent

    of_problem = np.repeat(counts, points.shape[1])
    distances = pairwise_distances(points.flatten(0, 1))
    own = labels.flatten(0, 1).cpu().numpy()
    assignment, representatives = represent(distances, of_problem, own, nearest=rule == "nearest")
    return split_layers(assignment, representatives, counts, points.device)


def split_layers(
    assignment: np.ndarray, representatives: np.ndarray, counts: Sequence[int], device: torch.device
) -> list[HeadClusters]:
    """The memberships of each layer from ``[L * B, H]`` and ``[L * B, k_max]``, filled up with H."""
    rows = len(assignment) // len(counts)
    both = torch.from_numpy(assignment).to(device), torch.from_numpy(representatives).to(device)
    layers = zip(*(tensor.unflatten(0, (-1, rows)) for tensor in both), counts, strict=True)
    return [HeadClusters(labels, chosen[:, :k]) for labels, chosen, k in layers]


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
