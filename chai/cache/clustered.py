"""The KV cache of clustered head attention: keys of the representatives, values of every head.

A request starts in warm-up: all KV heads are stored, and the queries of its first tokens are collected. Once every row
of the batch has its clusters, the keys of redundant heads leave the cache for good (paper, Section 3.5), and with
CHAI-QKV (Table 4) their values too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chai.cache.base import PrunedCache, PrunedLayer, RequestState
from chai.cache.growing import RowSelection
from chai.heads import HeadClusters, KVHeadMap, take_heads

# The phases of a clustered layer.


@dataclass
class WarmUp:
    """All KV heads are stored, until every row of the batch has its clusters.

    Attributes:
        queries: ``[B, H, warmup_tokens, D]``, queries of the warm-up tokens seen so far; ``None`` before the first.
        scaling: Factor of the scores.
        softcap: Bound of the scores, if the model has one.
        head_map: Clusters of the rows that have theirs (of other rows: anything); ``None`` if no row has.
    """

    queries: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    head_map: KVHeadMap | None = None


@dataclass
class WholePrompt:
    """The next call holds a whole prompt: the layer clusters its heads when the call reaches it."""


@dataclass
class Clustered:
    """Only the KV heads that representatives read are stored."""

    head_map: KVHeadMap


@dataclass
class WarmupTokens:
    """Positions of the warm-up tokens of each row, collected over one or more calls.

    A token counts if its own call shows it as real, wherever it is: padding may be left, right, or between two turns of
    a conversation.
    """

    positions: Tensor  # long [B, warmup_tokens], their positions in the sequence; -1 if not seen yet
    count: Tensor  # long [B], real tokens seen so far
    clustered: Tensor  # bool [B], rows that have their clusters

    @classmethod
    def unseen(cls, batch_size: int, warmup_tokens: int, device: torch.device) -> WarmupTokens:
        """Start with nothing seen."""
        positions = torch.full((batch_size, warmup_tokens), -1, device=device)
        count = positions.new_zeros(batch_size)
        return cls(positions, count, torch.zeros_like(count, dtype=torch.bool))

    @property
    def complete(self) -> Tensor:
        """Bool ``[B]``: rows whose warm-up tokens have all been seen."""
        return (self.positions >= 0).all(1)

    def ends(self, real: Tensor) -> list[int]:
        """Return after how many of a call's tokens (bool ``[B, T]``: not padding) some row completes its warm-up."""
        missing = self.positions.shape[1] - self.count
        reached = (real.cumsum(1) == missing[:, None]) & real & (missing > 0)[:, None]
        return [int(index) + 1 for index in reached.any(0).nonzero()]

    def add(self, real: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Add a call's new tokens, the first of which is at position ``offset``.

        Returns:
            Bool and long ``[B, warmup_tokens]``: which warm-up tokens are among the new ones, and their index there.
        """
        rank = torch.where(real, self.count[:, None] + real.cumsum(1) - 1, -1)  # [B, T], among the real tokens
        matches = rank[:, None] == torch.arange(self.positions.shape[1], device=real.device)[:, None]  # [B, w, T]
        present, index = matches.any(2), matches.to(torch.uint8).argmax(2)
        self.count = self.count + real.sum(1)
        self.positions = torch.where(present, index + offset, self.positions)
        return present, index

    def crop(self, kv_len: int) -> None:
        """Forget tokens from position ``kv_len`` on. Rows that are complete no longer count their tokens."""
        self.positions = torch.where(self.positions < kv_len, self.positions, -1)
        self.count = torch.where(self.complete, self.count, (self.positions >= 0).sum(1))
        self.clustered = self.clustered & self.complete

    def select_rows(self, select: RowSelection) -> WarmupTokens:
        """Select, reorder or repeat rows."""
        return WarmupTokens(select(self.positions), select(self.count), select(self.clustered))


class ClusteringState(RequestState):
    """State that the layers of a clustered cache share."""

    def reset(self) -> None:
        """Forget the sequences."""
        self.warmup: WarmupTokens | None = None  # None before the first call
        self.is_clustered = False  # every row has its clusters, and the keys of redundant heads are gone

    def select_rows(self, select: RowSelection) -> None:
        """Select, reorder or repeat rows."""
        self.warmup = None if self.warmup is None else self.warmup.select_rows(select)

    def crop(self, kv_len: int) -> None:
        """Forget dropped warm-up tokens; clusters stay once all rows have them, for the other keys are gone."""
        if self.warmup is not None and not self.is_clustered:
            self.warmup.crop(kv_len)


class ClusteredLayer(PrunedLayer):
    """A layer with fewer clusters than heads.

    Attributes:
        keys: ``[B, H_kv, S, D]`` during warm-up, then ``[B, n, S, D]`` with the ``n`` KV heads that are read.
        values: ``[B, H_kv, S, D]``; once values are evicted too, those of ``keys``.
        phase: :class:`WarmUp`, :class:`WholePrompt` or :class:`Clustered`.
        evicts_values: Values of redundant heads leave the cache with their keys.
    """

    phase: WarmUp | WholePrompt | Clustered

    def _clear(self) -> None:
        super()._clear()
        self.phase, self.evicts_values = WarmUp(), False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens (``[B, H_kv, T, D]`` each, or the stored KV heads alone); returns what is stored."""
        if isinstance(self.phase, WholePrompt):  # most of these keys are evicted in a moment: do not store them yet
            self.check_attached()
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        if isinstance(self.phase, Clustered):
            # The clusters may be known before the device of the layer is.
            self.phase.head_map = head_map = self.phase.head_map.to(key_states.device)
            if key_states.shape[1] != head_map.num_stored:
                key_states = take_heads(key_states, head_map.stored)
            if self.evicts_values and value_states.shape[1] != head_map.num_stored:
                value_states = take_heads(value_states, head_map.stored)
        return super().update(key_states, value_states)

    def collect_queries(
        self, query: Tensor, present: Tensor, index: Tensor, scaling: float, softcap: float | None = None
    ) -> None:
        """Collect the queries ``[B, H, T, D]`` of a call's warm-up tokens, which :meth:`WarmupTokens.add` has found."""
        assert isinstance(self.phase, WarmUp)
        present, index = present.to(query.device), index.to(query.device)  # the layer may be on another device
        new = take_tokens(query, index)
        before = torch.zeros_like(new) if self.phase.queries is None else self.phase.queries
        self.phase.queries = torch.where(present[:, None, :, None], new, before)
        self.phase.scaling, self.phase.softcap = scaling, softcap

    def set_row_clusters(self, rows: Tensor, clusters: HeadClusters) -> HeadClusters:
        """Set the clusters of some rows (bool ``[B]``); all KV heads stay stored.

        Returns:
            The clusters of all rows (of rows without clusters yet: anything).
        """
        assert isinstance(self.phase, WarmUp)
        device = clusters.assignment.device if self.phase.queries is None else self.phase.queries.device
        rows = rows.to(device)
        if self.phase.head_map is None:
            assignment = torch.zeros(len(rows), clusters.num_heads, dtype=torch.long, device=device)
            representatives = assignment[:, : clusters.k].clone()
        else:
            assignment = self.phase.head_map.clusters.assignment.clone()
            representatives = self.phase.head_map.clusters.representatives.clone()
        assignment[rows] = clusters.assignment.to(device)
        representatives[rows] = clusters.representatives.to(device)
        clusters = HeadClusters(assignment, representatives)
        self.phase.head_map = KVHeadMap.all_stored(clusters, self.num_kv_heads)
        return clusters

    def evict(self, clusters: HeadClusters, *, values: bool = False) -> None:
        """Drop the keys (with ``values``, the values too) of all KV heads that no representative reads."""
        head_map = KVHeadMap.only_read(clusters, self.num_kv_heads)
        if self.keys is not None:
            head_map = head_map.to(self.device)
        whole_prompt = isinstance(self.phase, WholePrompt)
        self.phase, self.evicts_values = Clustered(head_map), values
        if whole_prompt:  # nothing is stored yet
            assert self.keys is not None and self.values is not None
            self.keys = self.key_buffer.append(take_heads(self.keys, head_map.stored))
            new_values = take_heads(self.values, head_map.stored) if values else self.values
            self.values = self.value_buffer.append(new_values)
        elif self.key_buffer.length:
            self.keys = self.key_buffer.replace(lambda keys: take_heads(keys, head_map.stored))
            if values:
                self.values = self.value_buffer.replace(lambda values: take_heads(values, head_map.stored))

    def select_rows(self, select: RowSelection) -> None:
        """Select, reorder or repeat rows, clusters included."""
        super().select_rows(select)
        if isinstance(self.phase, Clustered):
            self.phase = Clustered(self.phase.head_map.map_tensors(select))
        elif isinstance(self.phase, WarmUp):
            queries, head_map = self.phase.queries, self.phase.head_map
            self.phase.queries = None if queries is None else select(queries)
            self.phase.head_map = None if head_map is None else head_map.map_tensors(select)


class ClusteredCache(PrunedCache[PrunedLayer]):
    """The KV cache of a clustering method: clustered layers where k < H, plain ones where every head is a cluster.

    Only a model under the method can update it; other attention would match the remaining keys with the wrong heads.
    """

    @classmethod
    def empty(
        cls,
        owner: object,
        num_clusters: Sequence[int],
        num_heads: int,
        num_kv_heads: int,
        windows: Sequence[int | None],
        reserve: int = 0,
    ) -> ClusteredCache:
        """Build an empty cache for an owner, with k and the sliding window of each layer."""
        state = ClusteringState(owner)
        layers: list[Any] = [
            (ClusteredLayer if k < num_heads else PrunedLayer)(state, index, num_kv_heads, window, reserve)
            for index, (k, window) in enumerate(zip(num_clusters, windows, strict=True))
        ]
        return cls(layers=layers)

    @property
    def clustered_layers(self) -> dict[int, ClusteredLayer]:
        """The layers with fewer clusters than heads, by index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, ClusteredLayer)}

    def clusters(self, layer: int) -> HeadClusters | None:
        """Return the clusters of a layer; ``None`` before all rows have theirs, and for layers with k = H."""
        phase = getattr(self.layers[layer], "phase", None)
        return phase.head_map.clusters if isinstance(phase, Clustered) else None

    def warmup_inputs(
        self, rows: Tensor, with_values: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, float, float | None]:
        """Return what the heads of some rows (bool ``[B]``), whose warm-up is complete, are clustered by.

        Returns:
            Queries ``[L, b, H, warmup_tokens, D]``, keys and, if asked for, values ``[L, b, H_kv, warmup_tokens, D]``
            of the warm-up tokens, the factor of the scores, and their bound. Where the factor differs between layers
            (GPT-2), the queries are multiplied with what it differs by.
        """
        positions: Tensor = self.state.warmup.positions[rows]
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        first = next(iter(self.clustered_layers.values())).phase
        assert isinstance(first, WarmUp)
        scaling, softcap = first.scaling, first.softcap
        for layer in self.clustered_layers.values():
            assert isinstance(layer.phase, WarmUp) and layer.phase.queries is not None and layer.keys is not None
            device = layer.keys.device
            own = layer.phase.queries[rows.to(device)].to(rows.device)
            queries.append(own if layer.phase.scaling == scaling else own * (layer.phase.scaling / scaling))
            for stored, taken in [(layer.keys, keys), (layer.values, values)][: 2 if with_values else 1]:
                assert stored is not None
                taken.append(take_tokens(stored[rows.to(device)], positions.to(device)).to(rows.device))
        return torch.stack(queries), torch.stack(keys), torch.stack(values) if values else None, scaling, softcap

    def expect_whole_prompt(self, warmup_tokens: int) -> None:
        """Let every layer cluster its heads in the next call, which begins with the warm-up tokens of all rows."""
        warmup = self.state.warmup
        positions = torch.arange(warmup_tokens, device=warmup.positions.device).repeat(len(warmup.positions), 1)
        counts = torch.full_like(warmup.count, warmup_tokens)
        self.state.warmup = WarmupTokens(positions, counts, torch.ones_like(warmup.clustered))
        self.state.is_clustered = True
        for layer in self.clustered_layers.values():
            layer.phase = WholePrompt()


def take_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Select tokens row by row: ``[B, N, T, X]`` and long ``[B, t]`` to ``[B, N, t, X]``."""
    return tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
