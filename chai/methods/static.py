"""Heads chosen offline, by their activations on a corpus, the same for every request (paper, Figures 1 and 14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from chai.clustering import HeadClusters
from chai.methods.base import ClusteredMethod
from chai.methods.random import Random
from chai.presets import resolve_clusters


@dataclass
class Static(ClusteredMethod):
    """Clustered attention whose membership is a profile's, for any number of clusters.

    With ``D_ij`` the squared distance between the attention of heads ``i`` and ``j``, mean over a corpus,

        membership of a layer = k-means of its heads by D into k clusters,

    which is the clustering of the heads' attention on all samples side by side (section 3.3); the member nearest its
    cluster's mean is the representative. It is known before the first token: keys of other heads are never stored.

    Attributes:
        clusters: see :class:`chai.methods.base.ClusteredMethod`; the paper's figures have 4, 8, 16 and 24.
        seed: not a setting, for nothing is drawn.
        profile: folder of the profile (:mod:`chai.profile`) whose distances are clustered.

    Raises:
        ValueError: no profile, or none of a model of the same shape.
    """

    clusters: list[int] | int | str | None = 4
    seed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._profile is None:
            raise ValueError(
                "no profile of this model is known: make one with python run.py experiment=profile model=NAME, "
                "then give its folder, method.profile=FOLDER (in a sweep over methods: model.profile=FOLDER)"
            )

    def with_count(self, k: int) -> ClusteredMethod:
        """A profile is of its own model's layers alone; any membership that is known from the start is as fast."""
        return Random(clusters=k)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """K of each layer.

        Raises:
            ValueError: counts or a profile that don't fit the model.
        """
        assert self._profile is not None
        self._profile.check(config)
        if self.clusters is None:
            return self._profile.counts
        return resolve_clusters(self.clusters, config.num_hidden_layers, config.num_attention_heads)

    def decide(
        self, layers: Sequence[int], counts: Sequence[int], query: torch.Tensor, key: torch.Tensor, scaling: float
    ) -> list[HeadClusters]:
        """The profile's membership for every row."""
        assert self._profile is not None
        own = (self._profile.static(layer, k) for layer, k in zip(layers, counts, strict=True))
        return [clusters.repeated(query.shape[1], query.device) for clusters in own]
