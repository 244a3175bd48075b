"""Random clusters: the control that shows what clustering by attention is worth (paper, Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chai.heads import HeadClusters
from chai.methods.chai import ClusteredHeadAttention


@dataclass
class Random(ClusteredHeadAttention):
    """In each layer, k random heads represent themselves, and every other head joins a random one of them.

    The clusters depend on the seed and the layer alone: they are the same for every request and known before the first
    token, so keys of the other heads are never stored.

    Attributes:
        clusters: See :class:`chai.methods.clustering.ClusteringMethod`.
        seed: Of the choice.
        profile: See :class:`chai.methods.clustering.ClusteringMethod`.
    """

    def cluster_heads(
        self,
        layers: Sequence[int],
        num_clusters: Sequence[int],
        query: Tensor,
        key: Tensor,
        scaling: float,
        softcap: float | None = None,
        outputs: Tensor | None = None,
    ) -> list[HeadClusters]:
        """Draw the clusters, the same for every row."""
        batch_size, num_heads = query.shape[1:3]
        clusters = []
        for layer, k in zip(layers, num_clusters, strict=True):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            representatives = torch.randperm(num_heads, generator=generator)[:k].sort().values
            assignment = torch.randint(k, (num_heads,), generator=generator)
            assignment[representatives] = torch.arange(k)
            row = HeadClusters(assignment[None], representatives[None])
            clusters.append(row.repeat(batch_size, query.device))
        return clusters
