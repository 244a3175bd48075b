"""Base of the methods that compute one head per cluster: counts, operations, bytes, benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from chai.attention import mha_attention
from chai.cache import ClusteredCache, vector_bytes
from chai.clustering.num_clusters import resolve_clusters
from chai.flops import LayerFlops, LayerShape, clustered_prompt_flops, decode_entries
from chai.heads import HeadClusters, KVHeadMap, take_heads
from chai.methods.base import Method, Saving
from chai.offline.head_profile import HeadProfile
from chai.patching.clustered import ClusteringSteps, clustered, new_clustered_cache
from chai.patching.model_info import check_family, layer_shape, logit_weights
from chai.patching.outputs import output_projections


@dataclass
class ClusteringMethod(ClusteringSteps, Method):
    """Base of the methods that compute one head per cluster.

    A subclass defines the steps of :class:`chai.patching.clustered.ClusteringSteps`; :mod:`chai.methods.chai` has the
    paper's.

    Attributes:
        clusters: Number of clusters of each layer: a list, one count for all layers, or the name of a preset
            (:data:`chai.clustering.num_clusters.PRESETS`).
        seed: Of everything random in the clustering.
        profile: Folder of a head profile (:mod:`chai.offline.head_profile`), whose counts replace ``clusters``.

    Raises:
        ProfileError: The head profile is missing or damaged.
    """

    clusters: list[int] | int | str | None = None
    seed: int = 0
    profile: str | None = None

    saving: ClassVar[Saving] = "real"
    #: Given counts come before those of the head profile, whose clusters the method uses anyway.
    given_counts_first: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._profile = None if self.profile is None else HeadProfile.load(self.profile)

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply to ``model`` inside a ``with`` block.

        Raises:
            ValueError: The family is not supported, the counts do not fit, or a method is applied already.
        """
        return clustered(model, self, tuple(self.heads_kept(model.config)))

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """Build an empty :class:`chai.cache.ClusteredCache`."""
        return new_clustered_cache(self, tuple(self.heads_kept(model.config)), model.config, reserve)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Return k of each layer (ValueError: counts or a head profile that do not fit the model, or neither)."""
        if self._profile is not None:
            self._profile.check(config)
            if self.clusters is None or not self.given_counts_first:
                return self._profile.num_clusters
        if self.clusters is None:
            raise ValueError("neither clusters nor a profile is given")
        return resolve_clusters(self.clusters, config.num_hidden_layers, config.num_attention_heads)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a family that is not supported, and counts that do not fit."""
        check_family(config)
        self.heads_kept(config)

    def check_weights(self, model: PreTrainedModel) -> None:
        """Refuse output projections that cannot be read, where the method needs them (ValueError)."""
        if self.needs_outputs or self.fitted_outputs:
            output_projections(model)

    # Operations and bytes.

    def layer_flops(self, config: PreTrainedConfig) -> list[LayerFlops]:
        """Scores of k heads after the warm-up; averages of all heads, or of k; W_O of all."""
        num_heads = config.num_attention_heads
        return [
            LayerFlops(k, k if self.shares_values else num_heads, num_heads, warmup_tokens=self.warmup_tokens)
            for k in self.heads_kept(config)
        ]

    def layer_shape(self, model: PreTrainedModel) -> LayerShape:
        """Return the shape of the model's layers, with or without shared values."""
        return layer_shape(model, self.shares_values)

    def prefill_flops(self, model: PreTrainedModel, q_len: int) -> float:
        """Count the operations of a prompt whose tokens all run with k heads."""
        counts = self.heads_kept(model.config)
        return clustered_prompt_flops(self.layer_shape(model), counts, q_len) + 2 * logit_weights(model)

    def decode_bytes(self, model: PreTrainedModel, kv_len: int, batch_size: int) -> float:
        """Count the bytes of weights, keys and values that a decode step reads."""
        entries = decode_entries(self.layer_shape(model), self.heads_kept(model.config), kv_len, batch_size)
        return model.dtype.itemsize * (entries + logit_weights(model))

    def expected_cache_bytes(self, model: PreTrainedModel, cache: Cache) -> int:
        """Count the bytes of the stored keys, and of all values (of the same KV heads if values are shared).

        With grouped queries, the stored KV heads depend on the clusters; without, each representative has its own.
        """
        view, shape = ClusteredCache.of(cache), layer_shape(model)
        heads = 0
        for index, k in enumerate(self.heads_kept(model.config)):
            read, clusters = shape.kv_heads_read(k), view.clusters(index)
            if clusters is not None and shape.num_kv_heads != shape.num_heads:
                kv_heads = clusters.representatives // (shape.num_heads // shape.num_kv_heads)
                read = max(len(set(row)) for row in kv_heads.tolist())
            shared = self.shares_values and clusters is not None
            heads += read + (read if shared else shape.num_kv_heads)
        return vector_bytes(cache) * heads * cache.get_seq_length()

    # Benchmarks.

    def with_num_clusters(self, k: int) -> Method:
        """Return the method with ``k`` clusters in every layer, ignoring its head profile."""
        return dataclasses.replace(self, clusters=k, profile=None)

    def benchmark_counts(self, config: PreTrainedConfig, requested: list[int] | None) -> list[int]:
        """Return the requested counts, or those that occur in the layers."""
        return requested or sorted(set(self.heads_kept(config)))

    def attention_timer(
        self, query: Tensor, key: Tensor, value: Tensor, k: int, scaling: float
    ) -> Callable[[], object]:
        """Time :meth:`attend` with clusters of equal size, the least favourable to grouping for a given k."""
        batch_size, num_heads = query.shape[:2]
        if k == num_heads:
            return lambda: mha_attention(query, key, value, scaling, None)
        assignment = (torch.arange(num_heads, device=query.device) % k).expand(batch_size, -1)
        representatives = torch.arange(k, device=query.device).expand(batch_size, -1)
        head_map = KVHeadMap.only_read(HeadClusters(assignment, representatives), key.shape[1])
        keys, queries = take_heads(key, head_map.stored), query[:, :k].contiguous()
        values = take_heads(value, head_map.stored) if self.shares_values else value
        return lambda: self.attend(queries, keys, values, head_map, scaling, None)

    def clustering_timer(self, model: PreTrainedModel, batch_size: int) -> Callable[[], object] | None:
        """Time :meth:`cluster_heads` on random queries and keys."""
        shape, counts = layer_shape(model), self.heads_kept(model.config)
        layers = [index for index, k in enumerate(counts) if k < shape.num_heads]
        if not self.warmup_tokens or not layers:
            return None
        sizes = (self.warmup_tokens, shape.head_dim)
        query = torch.randn(len(layers), batch_size, shape.num_heads, *sizes, device=model.device)
        key = torch.randn(len(layers), batch_size, shape.num_kv_heads, *sizes, device=model.device)
        num_clusters = [counts[index] for index in layers]
        outputs = torch.randn_like(query) if self.needs_outputs else None
        return lambda: self.cluster_heads(layers, num_clusters, query, key, shape.head_dim**-0.5, outputs=outputs)
