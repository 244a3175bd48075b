"""The cache of reserved length, and the clusters of a layer, in buffers that stay where they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chai.engine.support import Shape
from chai.engine.weights import LayerWeights
from chai.heads import HeadClusters, KVHeadMap, pack_kv_heads
from chai.kernels.tasks import Tasks


@dataclass
class ClusterBuffers:
    """The clusters of each row, as :class:`chai.heads.HeadClusters` and :class:`chai.heads.KVHeadMap` have them."""

    assignment: Tensor  # long [B, H]
    representatives: Tensor  # long [B, k]
    kv_heads: Tensor  # long [B, k], the KV head of each representative among the stored ones
    stored: Tensor  # long [B, n], the KV heads that the cache stores


class Layer:
    """One layer: its weights, its cache and its clusters.

    Attributes:
        keys: ``[B, n, S, D]``, those of the stored KV heads, rotated.
        values: ``[B, H_kv, S, D]``, or ``[B, n, S, D]`` if values are shared.
        k: Number of query heads whose scores are computed; ``H`` in a layer without clusters.
        clusters: ``None`` in a layer without clusters.
        shared: All rows have the same clusters, and the rows of their weights are gathered.
        head_map: The clusters as a map, new with each change of the clusters.
        tasks: The clusters as tasks of the kernels, by the number of members, as far as a kernel reads them.
    """

    def __init__(
        self,
        index: int,
        module: Any,
        shape: Shape,
        k: int,
        stored: int,
        shares_values: bool,
        batch_size: int,
        capacity: int,
    ) -> None:
        self.index, self.shape, self.k, self.shares_values = index, shape, k, shares_values and k < shape.num_heads
        self.clusters: ClusterBuffers | None = None
        self.head_map: KVHeadMap | None = None
        self.tasks: dict[int, Tasks] = {}
        self.shared = True
        clustered = k < shape.num_heads
        sizes = (k, stored, shares_values) if clustered else ()
        self.weights = LayerWeights(module, *sizes)
        try:
            like = self.weights.output.weight.detach()
            keys, values = stored if clustered else shape.num_kv_heads, shape.num_kv_heads
            size = (capacity, shape.head_dim)
            self.keys = like.new_zeros(batch_size, keys, *size)
            self.values = like.new_zeros(batch_size, keys if self.shares_values else values, *size)
            if clustered:
                counts = (shape.num_heads, k, k, stored)
                buffers = [torch.zeros(batch_size, n, dtype=torch.long, device=like.device) for n in counts]
                if shape.group == 1:  # without grouped queries: a KV head for each representative, in order
                    buffers[2] += torch.arange(k, device=like.device)
                    buffers[3] = buffers[1]
                elif stored == shape.num_kv_heads:  # all of them, in order
                    buffers[3] += torch.arange(stored, device=like.device)
                self.clusters = ClusterBuffers(*buffers)
        except BaseException:
            self.weights.restore()
            raise

    def free(self) -> None:
        """Drop cache, clusters and tasks; nothing runs afterwards."""
        del self.keys, self.values
        self.clusters = self.head_map = None
        self.tasks.clear()

    def set_clusters(self, clusters: HeadClusters, shared: bool) -> None:
        """Set the clusters of each row, or of all rows at once (``shared``: of a single row)."""
        buffers = self.clusters
        assert buffers is not None
        buffers.assignment.copy_(clusters.assignment.expand_as(buffers.assignment))
        buffers.representatives.copy_(clusters.representatives.expand_as(buffers.representatives))
        if self.shape.group > 1:
            read = buffers.representatives // self.shape.group
            index, stored = pack_kv_heads(read, self.shape.num_kv_heads, buffers.stored.shape[1])
            buffers.kv_heads.copy_(index)
            if buffers.stored.shape[1] < self.shape.num_kv_heads:
                buffers.stored.copy_(stored)
        self.shared = shared
        if shared:
            self.weights.gather(buffers.representatives[0], buffers.stored[0])
        self.head_map = KVHeadMap(
            HeadClusters(buffers.assignment, buffers.representatives), buffers.kv_heads, buffers.stored
        )


def count_stored(shape: Shape, k: int, group_aware: bool) -> int:
    """Return the KV heads that a layer with k clusters reserves: as many as k representatives can read.

    A group-aware clustering reads the fewest possible, ``ceil(k / group)``.
    """
    return math.ceil(k / shape.group) if group_aware else min(k, shape.num_kv_heads)
