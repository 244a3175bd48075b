"""CHAI: Clustered Head Attention (Agarwal et al., ICML 2024, https://arxiv.org/abs/2403.08058)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from chai.attention import clustered_attention
from chai.cache import ClusteredLayer
from chai.clustering.assignment import (
    Membership,
    Representative,
    agglomerative_clusters,
    clusters_by_cost,
    feature_distances,
    has_kernel,
    kmeans_clusters,
)
from chai.clustering.distances import EUCLIDEAN, Metric, head_costs
from chai.clustering.features import attention_features
from chai.heads import HeadClusters, KVHeadMap, repeat_kv
from chai.methods.clustering import ClusteringMethod
from chai.patching.model_info import num_kv_heads


class ClusteredHeadAttention(ClusteringMethod):
    """The inference steps of Section 3.4 and 3.5, for any clustering of the heads.

    Per request and layer with k clusters:

    1. warm-up: the first ``warmup_tokens`` real tokens run with all H heads,
    2. :meth:`cluster_heads`: find k clusters of heads, each with a representative,
    3. :meth:`evict`: keys of all heads but the representatives leave the cache,
    4. :meth:`attend`: only representatives are scored; members reuse their attention with the members' own values.
    """

    def evict(self, layer: ClusteredLayer, clusters: HeadClusters) -> None:
        """Keep the keys of the representatives alone; values of all heads stay (Section 3.5)."""
        layer.evict(clusters)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_map: KVHeadMap,
        scaling: float,
        mask: Tensor | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Compute ``y_h = A_{r(c(h))} V_h`` (Section 3.4); :mod:`chai.attention.reference` spells it out."""
        return clustered_attention(query, key, value, head_map, scaling, mask, softcap)


@dataclass
class Chai(ClusteredHeadAttention):
    """Heads that attend alike in a request's first tokens share one head's attention.

    The defaults are the text of the paper. The authors' release differs: ``membership="agglomerative",
    representative="lowest", features="unmasked"``.

    Attributes:
        clusters: k of each layer; see :class:`chai.methods.clustering.ClusteringMethod`.
        seed: Unused (clustering is deterministic).
        profile: See :class:`chai.methods.clustering.ClusteringMethod`.
        tokens: Number of warm-up tokens.
        membership: ``kmeans`` (Section 3.5), ``kmedoids``, or ``agglomerative`` (average linkage, cosine distance).
        representative: Of a cluster: the member ``nearest`` its mean, the ``lowest`` head index, or the member with the
            least error of the layer's ``output``.
        features: ``causal`` attention of the warm-up tokens, or ``unmasked``.
        group_aware: For grouped-query models: choose representatives that read as few KV heads as k of them can, so
            that whole KV heads leave the cache; replaces ``membership`` and ``representative``.
        metric: Distance between heads (:mod:`chai.clustering.distances`).

    Raises:
        ValueError: A value outside its choices, or choices that exclude each other.
    """

    tokens: int = 5
    membership: Membership = "kmeans"
    representative: Representative = "nearest"
    features: Literal["causal", "unmasked"] = "causal"
    group_aware: bool = False
    metric: Metric = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        hints = get_type_hints(type(self))
        for name in ("membership", "representative", "features", "metric"):
            if getattr(self, name) not in get_args(hints[name]):
                raise ValueError(f"{name} is '{getattr(self, name)}'; valid: {', '.join(get_args(hints[name]))}")
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; valid: 1 or more")
        if self.group_aware:
            return
        if self.membership == "kmeans" and self.metric not in EUCLIDEAN:
            raise ValueError(f"metric={self.metric} has no means; valid: membership=kmedoids, or another metric")
        if self.membership == "agglomerative" and self.metric != "attention":
            raise ValueError(
                "membership=agglomerative has its own metric, the cosine distance; valid: metric=attention, or "
                "membership=kmeans, kmedoids"
            )
        if self.membership == "kmedoids" and self.representative != "nearest":
            raise ValueError(
                f"membership=kmedoids chooses the representatives itself; representative is '{self.representative}', "
                "valid: nearest"
            )
        if self.membership == "agglomerative" and self.representative == "output":
            raise ValueError("representative=output is for membership=kmeans; valid: nearest, lowest")

    @property
    def warmup_tokens(self) -> int:
        """Tokens that run with all heads, five in the paper (Section 3.3, Figure 9)."""
        return self.tokens

    def clusters_on(self, device: torch.device, num_heads: int) -> bool:
        """Whether there is a kernel for these clusters."""
        by_attention = self.metric == "attention" and self.representative != "output"
        return self.membership == "kmeans" and by_attention and not self.group_aware and has_kernel(device, num_heads)

    @property
    def needs_outputs(self) -> bool:
        """Whether the error of the layer's output decides."""
        return self.metric == "output" or (self.representative == "output" and not self.group_aware)

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
        """Cluster heads by their attention among the warm-up tokens (Section 3.5)."""
        num_heads, num_kv = query.shape[2], key.shape[2]
        # One feature vector per head: its flattened attention matrix.
        key = repeat_kv(key, num_heads, dim=2)
        features = attention_features(query, key, scaling, self.features == "causal", softcap)  # [L, B, H, t * t]
        kv_heads = num_kv if self.group_aware else None
        # Group the heads, and choose a representative for each group.
        if self.metric == "attention" and not self.needs_outputs and kv_heads is None:
            if self.membership == "kmeans":
                return kmeans_clusters(features, num_clusters, self.representative)
            if self.membership == "agglomerative":
                return agglomerative_clusters(features, num_clusters, self.representative)
        weights = features.unflatten(-1, (query.shape[3], -1))
        errors = head_costs("output", weights, outputs) if self.needs_outputs else None
        if self.metric == "attention":
            cost = feature_distances(features)
        elif self.metric == "output":
            assert errors is not None
            cost = errors
        else:
            cost = head_costs(self.metric, weights)
        return clusters_by_cost(cost, num_clusters, self.membership, self.representative, errors, kv_heads)

    def note(self, config: PreTrainedConfig) -> str:
        """Return how much of the KV cache a grouped-query model saves."""
        num_heads, num_kv = config.num_attention_heads, num_kv_heads(config)
        if num_kv == num_heads:
            return ""
        read = [-(-k * num_kv // num_heads) for k in self.heads_kept(config)]
        share = 100 if self.shares_values else 50  # percent of the cache: keys and values, or keys alone
        saved = f"{share * (1 - sum(read) / (num_kv * len(read))):.1f} % of the KV cache"
        if self.group_aware:
            return f"grouped queries: {min(read)} to {max(read)} of {num_kv} KV heads are kept, which saves {saved}"
        return (
            f"grouped queries: saves at most {saved}, depending on how many KV heads the representatives share "
            "(group_aware=true maximizes this)"
        )
