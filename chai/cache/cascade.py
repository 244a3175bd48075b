"""The KV cache of cascade pruning (SpAtten): tokens and heads that a layer prunes leave it once the context is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from chai.cache.base import PrunedCache, PrunedLayer, RequestState
from chai.cache.buffer import TokenBuffer
from chai.cache.clustered import take_tokens
from chai.cache.growing import RowSelection
from chai.heads import pack_kv_heads, take_heads


@dataclass(frozen=True)
class CascadeRule:
    """How much each layer keeps."""

    tokens: tuple[float, ...]  # for each layer, the share of the context's tokens; not increasing
    heads: tuple[int, ...]  # for each layer, the number of heads; not increasing
    values: float  # share of the values, those of the largest weights, that a head reads for a token
    pruning: Literal["global", "per_row"]  # one choice for a sequence, or one for each token


@dataclass(frozen=True)
class RemainingHeads:
    """The heads of a layer that remain for text after the context."""

    query_heads: Tensor  # long [B, m], the query heads
    kv_heads: Tensor  # long [B, m], the stored KV head that each reads, as an index into the cache
    stored: Tensor  # long [B, n], the model's KV heads that are stored

    def select_rows(self, select: RowSelection) -> RemainingHeads:
        """Select, reorder or repeat rows."""
        return RemainingHeads(select(self.query_heads), select(self.kv_heads), select(self.stored))


class CascadeState(RequestState):
    """State that the layers of a cascade-pruned cache share."""

    def reset(self) -> None:
        """Forget the sequences."""
        self.contexts: Tensor | None = None  # long [B], real tokens that are context; None: those of the first call
        self.count: Tensor | None = None  # long [B], real tokens seen; None before the first call
        self.split = 0  # positions up to the end of the longest context
        self.is_pruned = False  # the context is over, and what is not kept of it is gone

    def select_rows(self, select: RowSelection) -> None:
        """Select, reorder or repeat rows."""
        self.count = None if self.count is None else select(self.count)
        self.contexts = None if self.contexts is None else select(self.contexts)


class CascadeLayer(PrunedLayer):
    """One layer's keys and values: all of them while the context lasts, then what is kept."""

    def _clear(self) -> None:
        super()._clear()
        self.seen = 0  # tokens of the sequence, dropped ones included
        self.split = 0  # tokens from here on are stored whole
        # While the context lasts:
        self.votes: Tensor | None = None  # fp32 [B, S], attention that its tokens gave in this layer
        self.sizes: Tensor | None = None  # fp32 [B, H], magnitude of the heads' outputs
        self.kept_tokens: Tensor | None = None  # bool [B, S], the tokens that text after it sees; None: all
        self.kept_heads: Tensor | None = None  # bool [B, H], the heads that it has; None: all
        # Once pruned:
        self.positions: Tensor | None = None  # long [B, n], the stored tokens of the first `split`; None: all
        self.valid: Tensor | None = None  # bool [B, n], false for padding, in rows that keep fewer tokens
        self.remaining: RemainingHeads | None = None  # None: all heads

    def get_seq_length(self) -> int:
        """Return the length of the sequence including dropped tokens; positions and masks depend on it."""
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens (``[B, H_kv, T, D]`` each); returns what is stored."""
        self.check_attached()
        self.seen += key_states.shape[2]
        if self.remaining is not None:
            stored = self.remaining.stored
            key_states, value_states = take_heads(key_states, stored), take_heads(value_states, stored)
        return super().update(key_states, value_states)

    def prune(self, split: int) -> None:
        """Drop what text after the context does not see; the context is in the first ``split`` tokens."""
        assert self.keys is not None and self.values is not None
        keys, values, self.split = self.keys, self.values, split
        if self.kept_tokens is not None:
            kept = self.kept_tokens[:, :split]
            # A stable sort puts the kept tokens of each row first, in their order.
            order = (~kept).to(torch.uint8).argsort(stable=True, dim=1)[:, : int(kept.sum(1).max())]
            self.positions, self.valid = order, kept.gather(1, order)
            keys, values = (torch.cat([take_tokens(held, order), held[:, :, split:]], 2) for held in (keys, values))
        if self.kept_heads is not None:
            count = int(self.kept_heads[0].sum())
            query_heads = (~self.kept_heads).to(torch.uint8).argsort(stable=True, dim=1)[:, :count]
            read = query_heads // (self.kept_heads.shape[1] // self.num_kv_heads)
            self.remaining = RemainingHeads(query_heads, *pack_kv_heads(read, self.num_kv_heads))
            keys, values = (take_heads(held, self.remaining.stored) for held in (keys, values))
        if keys is not self.keys:
            self.key_buffer, self.value_buffer = TokenBuffer(), TokenBuffer()
            self.keys, self.values = self.key_buffer.append(keys), self.value_buffer.append(values)
        self.votes = self.sizes = self.kept_tokens = self.kept_heads = None

    def visible(self, mask: Tensor) -> Tensor:
        """Convert a mask ``[B, T, S]`` of all tokens of the sequence to one of the stored tokens."""
        if self.positions is None or self.valid is None:
            return mask
        positions = self.positions[:, None].expand(-1, mask.shape[1], -1)
        context = mask.gather(2, positions) & self.valid[:, None]
        return torch.cat([context, mask[:, :, self.split :]], 2)

    def select_rows(self, select: RowSelection) -> None:
        """Select, reorder or repeat rows, choices included."""
        super().select_rows(select)
        for name in ("votes", "sizes", "kept_tokens", "kept_heads", "positions", "valid"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else select(tensor))
        self.remaining = None if self.remaining is None else self.remaining.select_rows(select)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens, which must be after the context (else ValueError)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if not self.split or self.seen + tokens_to_remove < self.split:
            raise ValueError(
                f"cannot remove {-tokens_to_remove} tokens: what is kept of the context depends on them; if it ends "
                "earlier, call method.set_context_lengths(cache, lengths) before the first call"
            )
        self.seen += tokens_to_remove
        self.keys = self.key_buffer.crop(self.key_buffer.length + tokens_to_remove)
        self.values = self.value_buffer.crop(self.value_buffer.length + tokens_to_remove)


class CascadeCache(PrunedCache[CascadeLayer]):
    """A KV cache from whose layers pruned tokens and heads are gone once the context has been seen."""

    @classmethod
    def empty(cls, rule: CascadeRule, num_kv_heads: int, reserve: int = 0) -> CascadeCache:
        """Build an empty cache."""
        state = CascadeState(rule)
        return cls(layers=[CascadeLayer(state, i, num_kv_heads, None, reserve) for i in range(len(rule.tokens))])

    @property
    def rule(self) -> CascadeRule:
        """How much is kept."""
        return cast(CascadeRule, self.state.owner)

    @property
    def contexts(self) -> Tensor | None:
        """Long ``[B]``, real tokens of each row that are its context.

        Set them before the first call if that holds more than the context, or not all of it; by default the tokens of
        the first call are the context.
        """
        return cast("Tensor | None", self.state.contexts)

    @contexts.setter
    def contexts(self, lengths: Tensor | None) -> None:
        self.state.contexts = lengths

    def advance(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Count the tokens of a call (bool ``[B, T]``: not padding).

        Returns:
            Bool ``[B, T]``, those of the context; long ``[B]``, the index of its last token, -1 if it is not here.

        Raises:
            ValueError: The context lengths do not fit the call; the cache holds another number of rows; or pruning is
                global and the call ends before the context.
        """
        state, batch_size = self.state, len(real)
        if state.count is None:
            state.count = torch.zeros(batch_size, dtype=torch.long, device=real.device)
        contexts = real.sum(1) if state.contexts is None else torch.as_tensor(state.contexts, device=real.device)
        if contexts.shape != (batch_size,) or len(state.count) != batch_size:
            raise ValueError(
                f"this call has {batch_size} sequences, the cache {len(state.count)}, its context lengths are of shape "
                f"{tuple(contexts.shape)}; valid: one length for each sequence"
            )
        if not state.is_pruned and bool((contexts < 1).any()):
            raise ValueError(f"a context has {int(contexts.min())} tokens; valid: 1 or more")
        state.contexts = contexts
        rank = state.count[:, None] + real.cumsum(1)
        context, last = real & (rank <= contexts[:, None]), real & (rank == contexts[:, None])
        ends = torch.where(last.any(1), last.to(torch.uint8).argmax(1), -1)
        if not state.is_pruned and self.rule.pruning == "global" and bool((ends < 0).any()):
            short = int((ends < 0).to(torch.uint8).argmax())
            raise ValueError(
                f"this call has {int(rank[short, -1])} of the {int(contexts[short])} tokens of a context, but global "
                "pruning needs the importance from all of them; valid: the whole context in one call, or "
                "pruning=per_row"
            )
        state.count = rank[:, -1]
        if not state.is_pruned and bool(last.any()):
            state.split = max(state.split, self.get_seq_length() + int(ends.max()) + 1)
        return context, ends

    def prune_if_over(self) -> None:
        """Once the contexts of all rows are over, drop what is not kept of them."""
        state = self.state
        if not state.is_pruned and bool((state.count >= state.contexts).all()):
            state.is_pruned = True
            for layer in self.pruned_layers:
                layer.prune(state.split)
