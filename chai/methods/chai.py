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
from chai.clustering.assignment import Representative, agglomerative_clusters, has_kernel, kmeans_clusters
from chai.clustering.features import attention_features
from chai.clustering.gqa import gqa_clusters
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
        membership: ``kmeans`` (Section 3.5) or ``agglomerative`` (average linkage, cosine distance).
        representative: The member ``nearest`` the mean of the cluster, or the ``lowest`` head index.
        features: ``causal`` attention of the warm-up tokens, or ``unmasked``.
        group_aware: For grouped-query models: choose representatives that read as few KV heads as k of them can, so
            that whole KV heads leave the cache; replaces ``membership`` and ``representative``.

    Raises:
        ValueError: A value outside its choices.
    """

    tokens: int = 5
    membership: Literal["kmeans", "agglomerative"] = "kmeans"
    representative: Representative = "nearest"
    features: Literal["causal", "unmasked"] = "causal"
    group_aware: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        hints = get_type_hints(type(self))
        for name in ("membership", "representative", "features"):
            if getattr(self, name) not in get_args(hints[name]):
                raise ValueError(f"{name} is '{getattr(self, name)}'; valid: {', '.join(get_args(hints[name]))}")
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; valid: 1 or more")

    @property
    def warmup_tokens(self) -> int:
        """Tokens that run with all heads, five in the paper (Section 3.3, Figure 9)."""
        return self.tokens

    def clusters_on(self, device: torch.device, num_heads: int) -> bool:
        """Whether there is a kernel for these clusters."""
        return self.membership == "kmeans" and not self.group_aware and has_kernel(device, num_heads)

    def cluster_heads(
        self,
        layers: Sequence[int],
        num_clusters: Sequence[int],
        query: Tensor,
        key: Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> list[HeadClusters]:
        """Cluster heads by their attention among the warm-up tokens (Section 3.5)."""
        num_heads, num_kv = query.shape[2], key.shape[2]
        # One feature vector per head: its flattened attention matrix.
        key = repeat_kv(key, num_heads, dim=2)
        features = attention_features(query, key, scaling, self.features == "causal", softcap)  # [L, B, H, t * t]
        if self.group_aware:
            return gqa_clusters(features, num_kv, num_clusters)
        # Group the heads, and choose a representative for each group.
        if self.membership == "kmeans":
            return kmeans_clusters(features, num_clusters, self.representative)
        return agglomerative_clusters(features, num_clusters, self.representative)

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
