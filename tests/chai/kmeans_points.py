"""K-means of points by the library's core, with the centroids that tests compare."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chai.clustering.kmeans import cluster, pairwise_distances


def kmeans(points: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster ``[N, P, F]`` into k clusters (one count, or one for each problem).

    Returns:
        labels ``[N, P]``, centroids ``[N, k_max, F]`` (zeros beyond a problem's own k), inertia ``[N]``.
    """
    counts = np.full(len(points), k) if isinstance(k, int) else k.numpy()
    labels, _, inertia = cluster(pairwise_distances(points.float().numpy()), counts, nearest=True)
    assigned = torch.from_numpy(labels)
    members = torch.nn.functional.one_hot(assigned, int(counts.max())).to(points).transpose(1, 2)
    centroids = members @ points / members.sum(2, keepdim=True).clamp(min=1)
    return assigned, centroids, torch.from_numpy(inertia).to(points)
