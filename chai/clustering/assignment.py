"""Assign heads to clusters and choose representatives, for all layers and rows at once (paper, Section 3.5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from chai.clustering.gqa import gqa_medoids
from chai.clustering.kmeans import cluster, pairwise_distances, represent
from chai.clustering.medoids import cheapest_members, medoid_clusters, refine_jointly
from chai.heads import HeadClusters
from chai.kernels import available
from chai.kernels.kmeans import MOST_POINTS, kmeans

#: ``nearest``: the member nearest the mean of the cluster, which for squared distances is also the medoid, the member
#: with the least sum of distances to the others. ``lowest``: the member with the lowest head index. ``output``: the
#: member whose attention changes the layer's output least, ``min_r sum_h |(A_r - A_h) V_h W_O,h|^2``.
Representative = Literal["nearest", "lowest", "output"]
#: ``kmeans``: Section 3.5. ``kmedoids``: the k representatives that cost the heads least. ``agglomerative``: average
#: linkage on the cosine distance, as the authors' release has it.
Membership = Literal["kmeans", "kmedoids", "agglomerative"]


def has_kernel(device: torch.device, num_heads: int) -> bool:
    """Whether K-means of this many heads runs as a kernel on a device."""
    return device.type == "cuda" and available(device) and num_heads <= MOST_POINTS


def kmeans_clusters(
    features: Tensor,
    num_clusters: Sequence[int],
    representative: Representative = "nearest",
    *,
    kernels: bool | None = None,
) -> list[HeadClusters]:
    """Cluster the heads of each layer and row by K-means on features ``[L, B, H, F]``, with k of each layer.

    With ``kernels`` (by default on CUDA devices) this is done on the features' device, the host reads no tensor, and
    after a first call with the same counts nothing is copied to the device, so that a CUDA graph can record it.

    Raises:
        ValueError: A k outside ``[1, H]``.
    """
    if kernels is None:
        kernels = has_kernel(features.device, features.shape[2])
    if kernels:
        num_heads = features.shape[2]
        for wrong in [k for k in num_clusters if not 1 <= k <= num_heads]:
            raise ValueError(f"{num_heads} points cannot have {wrong} clusters; valid: 1 to {num_heads}")
        on_device = _counts_on(tuple(num_clusters), features.shape[1], features.device)
        nearest, most = representative == "nearest", max(num_clusters, default=1)
        with torch.cuda.device(features.device if features.is_cuda else -1):
            found = kmeans(features.flatten(0, 1), on_device, nearest=nearest, most=most)
        return _split_layers(*found, num_clusters)
    distances = pairwise_distances(features.flatten(0, 1).detach().cpu().float().numpy())
    counts = np.repeat(num_clusters, features.shape[1])
    labels, representatives, _ = cluster(distances, counts, nearest=representative == "nearest")
    return split_layers(labels, representatives, num_clusters, features.device)


def feature_distances(features: Tensor) -> Tensor:
    """Return squared distances ``[L, B, H, H]`` of features ``[L, B, H, F]``; 0 where they differ by rounding alone."""
    distances = pairwise_distances(features.flatten(0, 1).detach().cpu().float().numpy())
    return torch.from_numpy(distances).unflatten(0, features.shape[:2]).to(features.device)


def clusters_by_cost(
    cost: Tensor,
    num_clusters: Sequence[int],
    membership: Membership = "kmeans",
    representative: Representative = "nearest",
    output_cost: Tensor | None = None,
    kv_heads: int | None = None,
    gram: Iterable[np.ndarray | None] | None = None,
) -> list[HeadClusters]:
    """Cluster the heads of each layer and row by costs ``[L, B, H, H]`` of a metric.

    Args:
        cost: Of head h with representative r at ``[..., h, r]`` (:mod:`chai.clustering.distances`).
        num_clusters: k of each layer.
        membership: ``kmeans`` (costs that are squared distances) or ``kmedoids``.
        representative: Of clusters by K-means.
        output_cost: ``[L, B, H, H]``, errors of the output, for ``representative="output"``.
        kv_heads: KV heads, if representatives are to read as few of them as k can; replaces the other choices.
        gram: For each layer and row, products of errors by which heads are reassigned at the end
            (:func:`chai.clustering.medoids.refine_jointly`).
    """
    costs = cost.flatten(0, 1).detach().cpu().float().numpy()
    counts = np.repeat(num_clusters, cost.shape[1])
    if kv_heads is not None:
        labels, representatives = gqa_medoids(costs, kv_heads, counts)
    elif membership == "kmedoids":
        labels, representatives = medoid_clusters(costs, counts)
    else:
        labels, representatives, _ = cluster(costs, counts, nearest=representative != "lowest")
        if representative == "output":
            assert output_cost is not None
            errors = output_cost.flatten(0, 1).detach().cpu().float().numpy()
            labels, representatives = cheapest_members(errors, labels, counts)
    if gram is not None:
        labels = refine_jointly(gram, labels, representatives, counts)
    return split_layers(labels, representatives, num_clusters, cost.device)


def agglomerative_clusters(
    features: Tensor, num_clusters: Sequence[int], representative: Representative = "nearest"
) -> list[HeadClusters]:
    """Cluster by average linkage on the cosine distance, as the authors' release does."""
    from sklearn.cluster import AgglomerativeClustering

    labels = torch.empty(features.shape[:3], dtype=torch.long)
    for layer, k in enumerate(num_clusters):
        model = AgglomerativeClustering(n_clusters=k, metric="cosine", linkage="average")
        for row, points in enumerate(features[layer].double().cpu().numpy()):
            labels[layer, row] = torch.from_numpy(model.fit_predict(points))
    return choose_representatives(features, labels, num_clusters, representative)


def choose_representatives(
    features: Tensor, labels: Tensor, num_clusters: Sequence[int], representative: Representative = "nearest"
) -> list[HeadClusters]:
    """Choose one member of each cluster to be computed for all.

    ``nearest`` takes the member nearest the mean of the cluster; of those within 0.01 %, the lowest head. Both heads of
    a cluster of two are equally far from its mean: rounding would choose between them, and a prompt in two calls could
    get another representative than the same prompt in one. Clusters are numbered by their representatives, so equal
    clusterings have equal tensors.

    Features are ``[L, B, H, F]``; in labels ``[L, B, H]`` each label in ``[0, num_clusters[l])`` occurs in layer l.
    """
    distances = pairwise_distances(features.flatten(0, 1).detach().cpu().float().numpy())
    counts = np.repeat(num_clusters, features.shape[1])
    rows = labels.flatten(0, 1).cpu().numpy()
    assignment, representatives = represent(distances, counts, rows, nearest=representative == "nearest")
    return split_layers(assignment, representatives, num_clusters, features.device)


def split_layers(
    assignment: np.ndarray, representatives: np.ndarray, num_clusters: Sequence[int], device: torch.device
) -> list[HeadClusters]:
    """Split ``[L * B, H]`` and ``[L * B, k_max]`` (padded with H) into the clusters of each layer."""
    tensors = torch.from_numpy(assignment).to(device), torch.from_numpy(representatives).to(device)
    return _split_layers(*tensors, num_clusters)


def _split_layers(assignment: Tensor, representatives: Tensor, num_clusters: Sequence[int]) -> list[HeadClusters]:
    """Split ``[L * B, H]`` and ``[L * B, k_max]`` into the clusters of each layer."""
    parts = (tensor.unflatten(0, (len(num_clusters), -1)) for tensor in (assignment, representatives))
    return [HeadClusters(labels, heads[:, :k]) for labels, heads, k in zip(*parts, num_clusters, strict=True)]


@lru_cache(maxsize=256)
def _counts_on(num_clusters: tuple[int, ...], batch_size: int, device: torch.device) -> Tensor:
    """Return k of each layer and row on a device: int32 ``[L * B]``."""
    with torch.inference_mode(False):  # cached for calls outside of inference mode, too
        return torch.tensor(num_clusters, dtype=torch.int32).repeat_interleave(batch_size).to(device)
