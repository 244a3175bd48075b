"""The number of clusters of each request, from the squared distances between its heads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.metrics import silhouette_score

from chai.clustering.kmeans import pairwise_distances, sweep

#: Reference data sets of the gap statistic.
REFERENCES = 10


def by_silhouette(distances: np.ndarray, features: np.ndarray, threshold: float) -> np.ndarray:
    """Choose the k from 2 to H - 1 with the highest mean silhouette (Rousseeuw, 1987); H if there is no such k.

    Args:
        distances: ``[B, H, H]``, squared.
        features: ``[B, H, F]``.
        threshold: Not used.

    Returns:
        ``[B]``.
    """
    heads = distances.shape[1]
    if heads < 3:
        return np.full(len(distances), heads)
    _, labels = sweep(distances)
    counts = [
        2 + int(np.argmax([silhouette_score(np.sqrt(own), row[k - 1], metric="precomputed") for k in range(2, heads)]))
        for own, row in zip(distances, labels, strict=True)
    ]
    return np.array(counts)


def by_gap(distances: np.ndarray, features: np.ndarray, threshold: float) -> np.ndarray:
    """Choose the least k with ``gap(k) >= gap(k + 1) - s(k + 1)`` (Tibshirani et al., 2001).

    ``gap(k)`` is by how much the logarithm of the inertia is below that of uniform points in the box of the features
    along their principal axes; ``s`` is the standard error of the latter. Arguments and result as in
    :func:`by_silhouette`.
    """
    heads = distances.shape[1]
    generator = np.random.default_rng(0)
    inertia, _ = sweep(distances)
    counts = []
    for points, own in zip(features.astype(np.float64), inertia, strict=True):
        centred = points - points.mean(0)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        along = centred @ axes.T
        low, high = along.min(0), along.max(0)
        uniform = generator.uniform(low, high, (REFERENCES, *along.shape)).astype(np.float32)
        reference, _ = sweep(pairwise_distances(uniform))
        # At k = H the inertia is 0, and its logarithm is not defined.
        logs = np.log(np.maximum(reference[:, : heads - 1], 1e-30))
        gap = logs.mean(0) - np.log(np.maximum(own[: heads - 1], 1e-30))
        error = logs.std(0) * np.sqrt(1 + 1 / REFERENCES)
        enough = np.flatnonzero(gap[:-1] >= gap[1:] - error[1:])
        counts.append(int(enough[0]) + 1 if len(enough) else max(1, heads - 1))
    return np.array(counts)


def by_error(distances: np.ndarray, features: np.ndarray, threshold: float) -> np.ndarray:
    """Choose the least k whose inertia is at most ``threshold`` of that with one cluster.

    Arguments and result as in :func:`by_silhouette`.
    """
    inertia, _ = sweep(distances)
    return (inertia <= threshold * inertia[:, :1]).argmax(1) + 1


COUNTS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "silhouette": by_silhouette,
    "gap": by_gap,
    "error": by_error,
}
