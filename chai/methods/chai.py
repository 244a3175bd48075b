"""CHAI: per request, heads that attend alike in the first tokens share one head's attention (paper, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from chai.clustering import HeadClusters, Representative, agglomerative, choose_representatives, head_features, kmeans
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
        seed: of the k-means starts.
        tokens: real tokens before the membership is decided.
        membership: ``kmeans`` (section 3.5) or ``agglomerative`` (average linkage, cosine distance).
        representative: the member ``nearest`` the cluster's mean, or the ``lowest`` head.
        features: ``causal`` attention, or ``unmasked`` scores of the first tokens.
        restarts: of k-means.

    Raises:
        ValueError: a value outside its choices.
    """

    tokens: int = 5
    membership: Literal["kmeans", "agglomerative"] = "kmeans"
    representative: Representative = "nearest"
    features: Literal["causal", "unmasked"] = "causal"
    restarts: int = 10

    def __post_init__(self) -> None:
        choices = {
            "membership": ("kmeans", "agglomerative"),
            "representative": ("nearest", "lowest"),
            "features": ("causal", "unmasked"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is '{getattr(self, name)}'; valid: {', '.join(valid)}")
        for name in ("tokens", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: 1 or more")

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
        found = []
        for own, k in zip(points, counts, strict=True):
            if self.membership == "kmeans":
                labels, _, _ = kmeans(own, k, seed=self.seed, restarts=self.restarts)
            else:
                labels = agglomerative(own, k)
            found.append(choose_representatives(own, labels, k, self.representative))
        return found
