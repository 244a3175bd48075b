"""CHAI: per request, heads that attend alike in the first tokens share one head's attention (paper, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig

from chai.clustering import HeadClusters, Representative, agglomerative, cluster_layers, head_features, represent_layers
from chai.key_groups import group_clusters
from chai.methods.base import ClusteredMethod


@dataclass
class Chai(ClusteredMethod):
    """Clustered head attention with the membership of each request found from its first tokens.

    The first ``tokens`` real tokens of a row run with all heads. Their attention, the ``tokens x tokens`` matrix of
    each head, is clustered into the layer's k clusters; from then on only one representative of each cluster
    computes scores and keeps its keys.

    The defaults are the paper's text. The authors' release differs: ``membership="agglomerative",
    representative="lowest", features="unmasked"``.

    Attributes:
        clusters: see :class:`chai.methods.base.ClusteredMethod`.
        seed: without effect, for nothing is drawn.
        profile: see :class:`chai.methods.base.ClusteredMethod`.
        tokens: real tokens before the membership is decided.
        membership: ``kmeans`` (section 3.5) or ``agglomerative`` (average linkage, cosine distance).
        representative: the member ``nearest`` the cluster's mean, or the ``lowest`` head.
        features: ``causal`` attention, or ``unmasked`` scores of the first tokens.
        group_aware: for grouped-query models, choose representatives that read as few key heads as k of them can, so
            that whole key heads leave the cache; takes the place of ``membership`` and ``representative``.

    Raises:
        ValueError: a value outside its choices.
    """

    tokens: int = 5
    membership: Literal["kmeans", "agglomerative"] = "kmeans"
    representative: Representative = "nearest"
    features: Literal["causal", "unmasked"] = "causal"
    group_aware: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "membership": ("kmeans", "agglomerative"),
            "representative": ("nearest", "lowest"),
            "features": ("causal", "unmasked"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is '{getattr(self, name)}'; valid: {', '.join(valid)}")
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; valid: 1 or more")

    @property
    def first_tokens(self) -> int:
        """``tokens``."""
        return self.tokens

    def decide(
        self, layers: Sequence[int], counts: Sequence[int], query: torch.Tensor, key: torch.Tensor, scaling: float
    ) -> list[HeadClusters]:
        """Cluster the heads of every layer by what they attend to in the first tokens."""
        group = query.shape[2] // key.shape[2]
        points = head_features(query, key.repeat_interleave(group, 2), scaling, causal=self.features == "causal")
        if self.group_aware:
            return group_clusters(points, key.shape[2], counts)
        if self.membership == "kmeans":
            return cluster_layers(points, counts, self.representative)
        labels = torch.stack([agglomerative(own, k) for own, k in zip(points, counts, strict=True)])
        return represent_layers(points, labels, counts, self.representative)

    def note(self, config: PreTrainedConfig) -> str:
        """What a grouped-query model saves."""
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        if key_heads == heads:
            return ""
        counts = self.heads_kept(config)
        kept = [-(-k * key_heads // heads) for k in counts]
        share = 100 if self.shares_values else 50  # of the bytes that keys, or keys and values, are
        saved = f"{share * (1 - sum(kept) / (key_heads * len(kept))):.1f} % of the K,V bytes"
        if self.group_aware:
            return f"grouped queries: {min(kept)} to {max(kept)} of {key_heads} key heads are kept, which saves {saved}"
        return f"grouped queries: at most {saved} saved, as far as representatives share keys (method.group_aware=true)"
