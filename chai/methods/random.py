"""Heads combined at random: the control that shows what choosing by attention is worth (paper, Figure 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chai.clustering import HeadClusters
from chai.methods.base import ClusteredMethod


@dataclass
class Random(ClusteredMethod):
    """Per layer, k heads drawn at random stand for themselves, and each other head follows one of them at random.

    The choice depends on the seed and the layer alone, so it is the same for every request, and it is made before the
    first token: keys of the other heads are never stored.

    Attributes:
        clusters: see :class:`chai.methods.base.ClusteredMethod`.
        seed: of the choice.
    """

    def decide(self, layer: int, k: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> HeadClusters:
        """The same random membership for every row."""
        rows, heads = query.shape[:2]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        representatives = torch.randperm(heads, generator=generator)[:k].sort().values
        assignment = torch.randint(k, (heads,), generator=generator)
        assignment[representatives] = torch.arange(k)
        device = query.device
        return HeadClusters(
            assignment.to(device).expand(rows, -1).contiguous(),
            representatives.to(device).expand(rows, -1).contiguous(),
        )
