"""The K,V cache of a clustered model: keys of the heads that are read, values of every head or of the same ones.

All state of a sequence lives here: where its first tokens stand, their queries, the membership found from them, the
keys kept. Until every row of the batch has its membership a layer keeps all keys; then it drops the others for good
(paper, section 3.5), and where representatives' values stand for their members' (Table 4, CHAI-QKV) the values too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache

from chai.attention import take_heads
from chai.clustering import HeadClusters
from chai.growing import GrowingLayer
from chai.kernels.plan import HeadPlan
from chai.membership import FirstTokens, MembershipRule, take_tokens


class ClusteredLayer(GrowingLayer):
    """One clustered layer: all keys while the membership is open, then those of the representatives.

    Attributes:
        keys: ``[B, H_key, S, D]`` until compacted, then ``[B, n, S, D]`` with the ``n`` key heads that are read.
        values: ``[B, H_value, S, D]``, all heads; with ``shares_values`` those of ``keys`` once compacted.
        queries: ``[B, H, tokens, D]``, queries of the first tokens while the membership is open.
        plan: who reads what; of the decided rows alone until compacted, ``None`` before.
        compacted: keys of redundant heads have been dropped (all rows have their membership).
        undivided: the next tokens are a whole prompt, from which :meth:`decide_now` decides.
    """

    def __init__(self, key_heads: int, reserve: int = 0, shares_values: bool = False) -> None:
        self.key_heads = key_heads  # the model's, which has as many value heads
        self.shares_values = shares_values
        super().__init__(reserve)

    def reset(self) -> None:
        """Forget the sequence, its first tokens and its membership."""
        super().reset()
        self.queries: Tensor | None = None
        self.scaling = 1.0
        self.plan: HeadPlan | None = None
        self.compacted = False
        self.undivided = False

    @property
    def nbytes_mha(self) -> int:
        """Bytes that all key heads and all values of these tokens take."""
        if self.keys is None or self.values is None:
            return 0
        return (self.keys[:, :1].nbytes + self.values[:, :1].nbytes) * self.key_heads

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns the keys and values that are kept.

        ``key_states`` is ``[B, H_key, T, D]``, or only the heads that are kept once compacted; ``value_states`` is
        ``[B, H_value, T, D]``, likewise if their values are shared.
        """
        if self.undivided:  # most of these keys are dropped in a moment
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys = key_states
            self.values = value_states if self.shares_values else self.held_values.append(value_states)
            self.undivided = False
            return self.keys, self.values
        if self.compacted:
            assert self.plan is not None
            if self.plan.kept.device != key_states.device:  # decided before the layer's device was known
                self.plan = self.plan.map_rows(lambda tensor: tensor.to(key_states.device))
            if key_states.shape[1] != self.plan.stored:
                key_states = take_heads(key_states, self.plan.kept)
            if self.shares_values and value_states.shape[1] != self.plan.stored:
                value_states = take_heads(value_states, self.plan.kept)
        return super().update(key_states, value_states, *args, **kwargs)

    def observe(self, query: Tensor, found: Tensor, index: Tensor, scaling: float) -> None:
        """Note the queries of the first tokens among those of a call.

        Args:
            query: ``[B, H, T, D]``.
            found: ``[B, tokens]``, see :meth:`chai.membership.FirstTokens.note`.
            index: likewise.
            scaling: factor of the scores.
        """
        found, index = found.to(query.device), index.to(query.device)  # the layer may be on another device
        picked = take_tokens(query, index)
        before = torch.zeros_like(picked) if self.queries is None else self.queries
        self.queries = torch.where(found[:, None, :, None], picked, before)
        self.scaling = scaling

    def decide_now(self, index: int, query: Tensor, key: Tensor, rule: MembershipRule, scaling: float) -> HeadPlan:
        """Find this layer's membership before other layers have theirs, and store what it keeps of the prompt.

        Args:
            index: of this layer.
            query: ``[B, H, tokens, D]``, of the first tokens.
            key: ``[B, H_key, tokens, D]``, likewise.
            rule: decides.
            scaling: factor of the scores.
        """
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        self.compact(rule.decide([index], query[None], key[None], scaling)[0])
        assert self.plan is not None
        self.keys = self.held_keys.append(take_heads(keys, self.plan.kept))
        if self.shares_values:
            self.values = self.held_values.append(take_heads(values, self.plan.kept))
        return self.plan

    def assign(self, ready: Tensor, clusters: HeadClusters) -> HeadClusters:
        """Take in the membership of some rows.

        Args:
            ready: bool ``[B]``, these rows.
            clusters: theirs, in this order.

        Returns:
            those of all rows; of rows without a membership yet, anything.
        """
        device = clusters.assignment.device if self.queries is None else self.queries.device
        ready = ready.to(device)
        if self.plan is None:
            assignment = torch.zeros(len(ready), clusters.heads, dtype=torch.long, device=device)
            representatives = assignment[:, : clusters.k].clone()
        else:
            assignment = self.plan.clusters.assignment.clone()
            representatives = self.plan.clusters.representatives.clone()
        assignment[ready] = clusters.assignment.to(device)
        representatives[ready] = clusters.representatives.to(device)
        clusters = HeadClusters(assignment, representatives)
        self.plan = HeadPlan.with_all_keys(clusters, self.key_heads)
        return clusters

    def compact(self, clusters: HeadClusters) -> None:
        """Keep only the heads that representatives read; called when every row has its membership."""
        plan = HeadPlan.with_read_keys(clusters, self.key_heads)
        self.compacted, self.queries = True, None
        if self.keys is not None:
            plan = plan.map_rows(lambda tensor: tensor.to(self.device))
        self.plan = plan
        if self.held_keys.length:
            self.keys = self.held_keys.replace(lambda keys: take_heads(keys, plan.kept))
            if self.shares_values:
                self.values = self.held_values.replace(lambda values: take_heads(values, plan.kept))

    def map_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Rows of everything, membership included."""
        super().map_rows(select)
        self.queries = None if self.queries is None else select(self.queries)
        self.plan = None if self.plan is None else self.plan.map_rows(select)


class ClusteredCache(Cache):
    """A K,V cache for a model to which a clustering method is applied.

    ``generate()`` and plain calls get one by themselves; build one (``method.new_cache(model)``) to look into it or
    to go on with a conversation. Refused by every attention other than ours: its keys would be misread.

    Attributes:
        rule: decides the memberships.
        first: where the first tokens stand; ``None`` before the first call.
        decided: bool ``[B]``, the rows that have their membership; ``None`` before the first call.
        settled: every row has its membership, and keys of redundant heads are dropped.
    """

    def __init__(
        self,
        rule: MembershipRule,
        layers: list[Any],
        heads: int,
        key_heads: int,
        windows: list[int | None] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        self.rule = rule
        self.heads, self.key_heads = heads, key_heads  # the model's
        self.windows = windows or [None] * len(layers)  # sliding windows of the model's layers
        self._forget()

    def _forget(self) -> None:
        self.first: FirstTokens | None = None
        self.decided: Tensor | None = None
        self.settled = False

    @property
    def _own(self) -> list[GrowingLayer]:
        return cast(list[GrowingLayer], self.layers)

    @property
    def clustered(self) -> list[tuple[int, ClusteredLayer]]:
        """The layers with fewer clusters than heads, and their indices."""
        return [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, ClusteredLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of the live keys and values of all layers."""
        return cache_bytes(self)

    @property
    def nbytes_allocated(self) -> int:
        """The same with the room for further tokens."""
        return sum(layer.nbytes_allocated for layer in self._own)

    @property
    def nbytes_mha(self) -> int:
        """Bytes that the stock cache would hold for the same tokens under multi-head attention.

        With a sliding window the stock cache drops tokens beyond it and this one doesn't, so past the window
        ``nbytes`` may be the larger.
        """
        total = 0
        for layer, window in zip(self._own, self.windows, strict=True):
            full, length = layer.nbytes_mha, self.get_seq_length()
            if window is not None and length > window - 1:  # the stock layer keeps what the next token still sees
                full = full // length * (window - 1)
            total += full
        return total

    def clusters(self, layer: int) -> HeadClusters | None:
        """Membership of a layer; ``None`` before it is decided for all rows, and for layers with k = H."""
        held = self.layers[layer]
        return held.plan.clusters if isinstance(held, ClusteredLayer) and held.compacted and held.plan else None

    def begin(self, rows: int, device: torch.device) -> None:
        """At the first call: nothing seen of ``rows`` sequences; a rule that needs no tokens decides at once."""
        self.first = FirstTokens.unseen(rows, self.rule.tokens, device)
        self.decided = torch.zeros(rows, dtype=torch.bool, device=device)
        if not self.clustered:
            self.settled = True
        elif self.rule.tokens == 0:
            query = torch.empty(len(self.clustered), rows, self.heads, 0, 1, device=device)
            key = torch.empty(len(self.clustered), rows, self.key_heads, 0, 1, device=device)
            self._decide(~self.decided, query, key, 1.0)

    def settle(self) -> None:
        """Decide the rows whose first tokens are now known; once all are, drop the keys of redundant heads."""
        if self.settled:
            return
        assert self.first is not None
        assert self.decided is not None
        ready = self.first.complete & ~self.decided
        if not bool(ready.any()):
            return
        positions, queries, keys = self.first.positions[ready], [], []
        for _, layer in self.clustered:
            assert layer.queries is not None
            assert layer.keys is not None
            here = layer.queries.device
            queries.append(layer.queries[ready.to(here)].to(ready.device))
            keys.append(take_tokens(layer.keys[ready.to(here)], positions.to(here)).to(ready.device))
        self._decide(ready, torch.stack(queries), torch.stack(keys), self.clustered[0][1].scaling)

    def decide_in_layers(self) -> None:
        """Let every layer decide by itself in the next call, which begins with the first tokens of all rows."""
        assert self.first is not None
        assert self.decided is not None
        rows, tokens = self.first.positions.shape
        places = torch.arange(tokens, device=self.first.positions.device)
        self.first = FirstTokens(places.repeat(rows, 1), torch.full_like(self.first.count, tokens))
        self.decided, self.settled = torch.ones_like(self.decided), True
        for _, layer in self.clustered:
            layer.undivided = True

    def _decide(self, ready: Tensor, query: Tensor, key: Tensor, scaling: float) -> None:
        assert self.decided is not None
        found = self.rule.decide([index for index, _ in self.clustered], query, key, scaling)
        self.decided = self.decided | ready
        self.settled = bool(self.decided.all())
        at_once = bool(ready.all())
        for (_, layer), clusters in zip(self.clustered, found, strict=True):
            if not at_once:
                clusters = layer.assign(ready, clusters)
            if self.settled:
                layer.compact(clusters)

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

    def reset(self) -> None:
        """Forget the sequences."""
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens of every layer; what was observed of them is forgotten.

        Once settled the memberships stay, even if their own first tokens are dropped: the other keys are gone.
        """
        super().crop(tokens_to_remove)
        if not self.settled and self.first is not None and self.decided is not None:
            self.first.crop(self.get_seq_length())
            self.decided = self.decided & self.first.complete

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx`` (long ``[B]``), memberships included."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, memberships included."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, memberships included."""
        super().batch_select_indices(indices)
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _map_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        self.first = None if self.first is None else self.first.map_rows(select)
        self.decided = None if self.decided is None else select(self.decided)


def layer_bytes(layer: Any) -> int:
    """Bytes of a cache layer's live keys and values, of whatever kind the layer is."""
    return sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the live keys and values of any cache."""
    return sum(map(layer_bytes, cache.layers))
