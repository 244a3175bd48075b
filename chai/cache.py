"""The K,V cache of a clustered model: keys of the heads that are read, values of every head.

All state of a sequence lives here: which tokens were observed, the membership found from them, the keys kept. Until
every row of the batch has its membership a layer keeps all keys; then it drops the others for good (section 3.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from chai.attention import expand_heads, take_heads
from chai.clustering import HeadClusters
from chai.membership import FirstTokens, MembershipRule


class ClusteredLayer(DynamicLayer):
    """One layer's keys and values, its observed first tokens, and its membership once decided.

    Attributes:
        keys: ``[B, H_key, S, D]`` until compacted, then ``[B, n, S, D]`` with the ``n`` key heads that are read.
        values: ``[B, H_value, S, D]``, always all heads.
        clusters: membership of the decided rows; rows not yet ``decided`` hold a placeholder.
        decided: bool ``[B]``; ``None`` before the first call.
        first: the first real tokens; ``None`` before the first call.
        key_heads: ``[B, k]``, where in ``keys`` each representative's key head stands; ``None`` until compacted.
    """

    def __init__(self, rule: MembershipRule, index: int) -> None:
        super().__init__()
        self.rule = rule
        self.index = index
        self.reset()

    def reset(self) -> None:
        """Forget the sequence: keys, values, what was observed, and the membership."""
        super().reset()
        self.clusters: HeadClusters | None = None
        self.decided: Tensor | None = None
        self.first: FirstTokens | None = None
        self.key_heads: Tensor | None = None
        self._kept: Tensor | None = None  # [B, n]: the key heads that `keys` holds, once compacted
        self._full_key_heads = 0

    @property
    def compacted(self) -> bool:
        """Whether keys of redundant heads have been dropped (all rows have their membership)."""
        return self._kept is not None

    @property
    def all_decided(self) -> bool:
        """Whether every row of the batch has its membership."""
        return self.decided is not None and bool(self.decided.all())

    @property
    def nbytes_mha(self) -> int:
        """Bytes that all key heads and all values of these tokens take."""
        if self.keys is None or self.values is None:
            return 0
        return self.keys[:, :1].nbytes * self._full_key_heads + self.values.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens (``[B, H_key, T, D]`` each); returns the keys that are kept and all values."""
        self._full_key_heads = key_states.shape[1]
        if self._kept is not None:
            key_states = take_heads(key_states, self._kept)
        return super().update(key_states, value_states, *args, **kwargs)

    def observe(self, query: Tensor, visible: Tensor, scaling: float) -> Tensor:
        """Note the first real tokens among these queries, and decide the rows for which all of them are known.

        Args:
            query: ``[B, H, T, D]``, the queries of this call.
            visible: bool ``[B, S]``, the keys that any query of this call may attend to (false: padding).
            scaling: factor of the scores.

        Returns:
            long ``[B, T]``, the place of each token among its row's real tokens, from 0; -1 for padding.
        """
        if self.first is None or self.decided is None:
            self.first = FirstTokens.before(query, self.rule.tokens)
            self.decided = torch.zeros(len(query), dtype=torch.bool, device=query.device)
        order = self.first.note(query, visible)
        ready = self.first.complete & ~self.decided
        if bool(ready.any()):
            self._decide(self.first, ready, scaling)
            self.decided = self.decided | ready
        return order

    def _decide(self, first: FirstTokens, ready: Tensor, scaling: float) -> None:
        """Membership of the rows that are ready."""
        assert self.keys is not None
        rows, heads = first.queries.shape[:2]
        if self.clusters is None:
            placeholder = torch.zeros(rows, heads, dtype=torch.long, device=ready.device)
            self.clusters = HeadClusters(placeholder, placeholder[:, : self.rule.clusters_of(self.index)])
        key = first.pick(self.keys)[ready]
        found = self.rule.decide(self.index, first.queries[ready], expand_heads(key, heads), scaling)
        assignment, representatives = self.clusters.assignment.clone(), self.clusters.representatives.clone()
        assignment[ready], representatives[ready] = found.assignment, found.representatives
        self.clusters = HeadClusters(assignment, representatives)

    def compact(self) -> None:
        """Keep only the key heads that representatives read; called when every row is decided.

        Rows may need different numbers of key heads (grouped queries); the largest decides, other rows repeat one.
        """
        assert self.clusters is not None
        assert self.keys is not None
        group = self.clusters.heads // self._full_key_heads
        wanted = self.clusters.representatives // group  # [B, k]
        needed = torch.nn.functional.one_hot(wanted, self._full_key_heads).amax(1).bool()  # [B, H_key]
        most = int(needed.sum(1).max())
        # A stable sort puts each row's needed heads first, in their own order.
        kept = (~needed).to(torch.uint8).argsort(stable=True, dim=1)[:, :most]
        self._kept = torch.where(needed.gather(1, kept), kept, kept[:, :1])
        self.key_heads = (needed.cumsum(1) - 1).gather(1, wanted)
        self.keys = take_heads(self.keys, self._kept)

    def _map_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Let everything that is per row follow a change of the batch."""
        for name in ("decided", "key_heads", "_kept"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else select(tensor))
        if self.first is not None:
            self.first = self.first.map_rows(select)
        if self.clusters is not None:
            self.clusters = HeadClusters(select(self.clusters.assignment), select(self.clusters.representatives))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx`` (long ``[B]``), membership included."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, membership included."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, membership included."""
        super().batch_select_indices(indices)
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; what was observed of them is forgotten.

        Once compacted the membership stays, even if its own first tokens are dropped: other keys are gone.
        """
        super().crop(tokens_to_remove)
        if self.first is not None and self.decided is not None and not self.compacted:
            self.first.crop(self.get_seq_length())
            self.decided = self.decided & self.first.complete


class ClusteredCache(Cache):
    """A K,V cache for a model to which a clustering method is applied.

    ``generate()`` and plain calls get one by themselves; build one (``method.new_cache(model)``) to look into it or
    to go on with a conversation. Refused by every attention other than ours: its keys would be misread.
    """

    def __init__(self, rule: MembershipRule, layers: list[Any], windows: list[int | None] | None = None) -> None:
        super().__init__(layers=layers)
        self.rule = rule
        self.windows = windows or [None] * len(layers)  # sliding windows of the model's layers

    @property
    def nbytes(self) -> int:
        """Bytes of the live keys and values of all layers."""
        return cache_bytes(self)

    @property
    def nbytes_mha(self) -> int:
        """Bytes that the stock cache would hold for the same tokens under multi-head attention.

        With a sliding window the stock cache drops tokens beyond it and this one doesn't, so past the window
        ``nbytes`` may be the larger.
        """
        total = 0
        for layer, window in zip(self.layers, self.windows, strict=True):
            full = layer.nbytes_mha if isinstance(layer, ClusteredLayer) else layer_bytes(layer)
            length = self.get_seq_length()
            if window is not None and length > window - 1:  # the stock layer keeps what the next token still sees
                full = full // length * (window - 1)
            total += full
        return total

    def clusters(self, layer: int) -> HeadClusters | None:
        """Membership of a layer; ``None`` before it is decided for all rows, and for layers with k = H."""
        held = self.layers[layer]
        return held.clusters if isinstance(held, ClusteredLayer) and held.all_decided else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer; only while our own attention reads it.

        Raises:
            RuntimeError: the model runs without the method that this cache belongs to.
        """
        from chai.runtime import active_cache

        if active_cache() is not self:
            raise RuntimeError(
                "this ClusteredCache holds the keys of representative heads only: "
                "use it inside `with method(model):` of the method that made it"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def layer_bytes(layer: Any) -> int:
    """Bytes of a cache layer's live keys and values, of whatever kind the layer is."""
    return sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the live keys and values of any cache."""
    return sum(map(layer_bytes, cache.layers))
