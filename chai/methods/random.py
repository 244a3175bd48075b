"""Heads combined at random: the control that shows what choosing by attention is worth (paper, Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
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
        profile: see :class:`chai.methods.base.ClusteredMethod`.
    """

    def decide(
        self, layers: Sequence[int], counts: Sequence[int], query: torch.Tensor, key: torch.Tensor, scaling: float
    ) -> list[HeadClusters]:
        """The same random membership for every row."""
        rows, heads = query.shape[1:3]
        found = []
        for layer, k in zip(layers, counts, strict=True):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            representatives = torch.randperm(heads, generator=generator)[:k].sort().values
            assignment = torch.randint(k, (heads,), generator=generator)
            assignment[representatives] = torch.arange(k)
            found.append(HeadClusters(assignment[None], representatives[None]).repeated(rows, query.device))
        return found
