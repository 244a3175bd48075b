"""Cascade pruning of tokens and heads: what a layer keeps is chosen by the attention of the layers before it.

``S_l[i, j]`` is the attention that token ``j`` was given up to layer ``l`` by the tokens up to ``i``, and ``G_l[i, h]``
the magnitude of head ``h``'s outputs there (Wang et al. 2021, section III),

    S_l[i, j] = sum over l' <= l, i' <= i, heads h of A_{l',h}[i', j],
    G_l[i, h] = sum over l' <= l, i' <= i of |y_{l',h}[i']|_1.

In layer ``l`` a token ``i`` of the context sees the top tokens by ``S_{l-1}[i]`` among those that it saw in the layer
before, itself always among them, and has the top heads by ``G_{l-1}[i]`` among those that it had there. So no token
depends on a later one. What the last token of the context sees and has, all text after it sees of the context and
has: that stays in the cache. Scores of padding and of text after the context count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache

from chai.attention import take_heads
from chai.cache import cache_bytes
from chai.growing import GrowingLayer, GrowingTensor
from chai.kernels.plan import read_key_heads
from chai.membership import take_tokens


@dataclass(frozen=True)
class CascadeRule:
    """How much is kept.

    Attributes:
        tokens: for each layer, the share of the context's tokens; doesn't grow from layer to layer.
        heads: for each layer, the number of heads; likewise.
        values: share of the values, those of the largest weights, that a head reads for a token.
    """

    tokens: tuple[float, ...]
    heads: tuple[int, ...]
    values: float


def share_of(count: Tensor, share: float) -> Tensor:
    """``share`` of each count, rounded up, at least one (long)."""
    return (count.double() * share - 1e-9).ceil().long().clamp(min=1)


def keep_top(scores: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """Bool ``[..., N]``: the ``count`` (``[...]``) candidates of the largest scores; of equal ones the first.

    Equal but for rounding: heads that read the same value head have the same output for the first token, for instance.
    """
    largest = scores.masked_fill(~candidates, 0).abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scores = (scores / largest * 2**16).round()
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(-1) < count[..., None]) & candidates


@dataclass(frozen=True)
class HeadsLeft:
    """The heads of a layer that text after the context has.

    Attributes:
        queries: long ``[B, m]``, the query heads.
        places: long ``[B, m]``, the stored key head that each reads.
        stored: long ``[B, n]``, the model's key heads that are stored.
    """

    queries: Tensor
    places: Tensor
    stored: Tensor

    def map_rows(self, select: Callable[[Tensor], Tensor]) -> HeadsLeft:
        """The same for other rows."""
        return HeadsLeft(select(self.queries), select(self.places), select(self.stored))


class CascadeLayer(GrowingLayer):
    """One layer's keys and values: all of them while the context lasts, then of what is left of it.

    Attributes:
        seen: tokens of the sequence, those that were dropped included.
        votes: fp32 ``[B, S]``, attention that the context's tokens gave in this layer; until it is settled.
        sizes: fp32 ``[B, H]``, magnitude of the heads' outputs, likewise.
        kept: bool ``[B, S]``, the tokens that text after the context sees; ``None``: all.
        heads: bool ``[B, H]``, the heads that it has; ``None``: all.
        places: long ``[B, n]``, once settled, the tokens stored of the first ``split``; ``None``: all.
        valid: bool ``[B, n]``, those that aren't just there because another row keeps more.
        left: once settled; ``None``: all heads.
        split: the tokens from here on are stored whole.
    """

    def __init__(self, key_heads: int, reserve: int = 0) -> None:
        self.key_heads = key_heads  # the model's
        super().__init__(reserve)

    def reset(self) -> None:
        """Forget the sequence and what was chosen of it."""
        super().reset()
        self.seen, self.split = 0, 0
        self.votes: Tensor | None = None
        self.sizes: Tensor | None = None
        self.kept: Tensor | None = None
        self.heads: Tensor | None = None
        self.places: Tensor | None = None
        self.valid: Tensor | None = None
        self.left: HeadsLeft | None = None

    def get_seq_length(self) -> int:
        """Tokens of the sequence: positions and masks go by these."""
        return self.seen

    @property
    def nbytes_mha(self) -> int:
        """Bytes that all heads of all tokens take."""
        if self.keys is None or self.values is None:
            return 0
        one = self.keys[:, :1, :1].nbytes + self.values[:, :1, :1].nbytes
        return one * self.key_heads * self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens (``[B, H_key, T, D]`` each); returns what is stored."""
        self.seen += key_states.shape[2]
        if self.left is not None:
            key_states, value_states = (take_heads(new, self.left.stored) for new in (key_states, value_states))
        return super().update(key_states, value_states)

    def settle(self, split: int) -> None:
        """Drop what text after the context doesn't see; the context is in the first ``split`` tokens."""
        assert self.keys is not None and self.values is not None
        keys, values, self.split = self.keys, self.values, split
        if self.kept is not None:
            kept = self.kept[:, :split]
            # A stable sort puts each row's kept tokens first, in their own order.
            order = (~kept).to(torch.uint8).argsort(stable=True, dim=1)[:, : int(kept.sum(1).max())]
            self.places, self.valid = order, kept.gather(1, order)
            keys, values = (torch.cat([take_tokens(held, order), held[:, :, split:]], 2) for held in (keys, values))
        if self.heads is not None:
            queries = (~self.heads).to(torch.uint8).argsort(stable=True, dim=1)[:, : int(self.heads[0].sum())]
            wanted = queries // (self.heads.shape[1] // self.key_heads)
            self.left = HeadsLeft(queries, *read_key_heads(wanted, self.key_heads))
            keys, values = (take_heads(held, self.left.stored) for held in (keys, values))
        if keys is not self.keys:
            self.held_keys, self.held_values = GrowingTensor(), GrowingTensor()
            self.keys, self.values = self.held_keys.append(keys), self.held_values.append(values)
        self.votes = self.sizes = self.kept = self.heads = None

    def visible(self, mask: Tensor) -> Tensor:
        """A mask ``[B, T, S]`` of all the sequence's tokens as one of what is stored."""
        if self.places is None or self.valid is None:
            return mask
        places = self.places[:, None].expand(-1, mask.shape[1], -1)
        context = mask.gather(2, places) & self.valid[:, None]
        return torch.cat([context, mask[:, :, self.split :]], 2)

    def map_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Rows of everything, of what was chosen as well."""
        super().map_rows(select)
        for name in ("votes", "sizes", "kept", "heads", "places", "valid"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else select(tensor))
        self.left = None if self.left is None else self.left.map_rows(select)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens, which must be after the context.

        Raises:
            ValueError: they aren't.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if not self.split or self.seen + tokens_to_remove < self.split:
            raise ValueError(
                f"can't remove {-tokens_to_remove} tokens: they chose what is kept of the context; "
                "set cache.contexts to its lengths if it ends before them"
            )
        self.seen += tokens_to_remove
        self.keys = self.held_keys.crop(self.held_keys.length + tokens_to_remove)
        self.values = self.held_values.crop(self.held_values.length + tokens_to_remove)


class CascadeCache(Cache):
    """A K,V cache from whose layers pruned tokens and heads are gone once the context has been seen.

    Attributes:
        rule: how much is kept.
        contexts: long ``[B]``, real tokens of each row that are its context. Set them before the first call where it
            holds more than the context, or not all of it; if not set, the first call's tokens are the context.
        settled: the context is over, and what isn't kept of it is dropped.
    """

    def __init__(self, rule: CascadeRule, key_heads: int, reserve: int = 0) -> None:
        super().__init__(layers=[CascadeLayer(key_heads, reserve) for _ in rule.tokens])
        self.rule = rule
        self._forget()

    def _forget(self) -> None:
        self.contexts: Tensor | None = None
        self.settled = False
        self.counted: Tensor | None = None  # long [B]: real tokens seen
        self.split = 0  # columns up to the end of the longest context

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
        """Bytes that the stock cache would hold for the same tokens."""
        return sum(layer.nbytes_mha for layer in self._own)

    @property
    def _own(self) -> list[CascadeLayer]:
        return cast(list[CascadeLayer], self.layers)

    def advance(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Take note of a call's tokens.

        Args:
            real: bool ``[B, T]``, those that aren't padding.

        Returns:
            bool ``[B, T]``, those of the context; long ``[B]``, the place of its last token, -1 if it isn't here.

        Raises:
            ValueError: ``contexts`` doesn't fit the call, or the cache holds another number of rows.
        """
        rows = len(real)
        if self.counted is None:
            self.counted = torch.zeros(rows, dtype=torch.long, device=real.device)
        contexts = real.sum(1) if self.contexts is None else torch.as_tensor(self.contexts, device=real.device)
        if contexts.shape != (rows,) or len(self.counted) != rows:
            raise ValueError(
                f"this call has {rows} sequences, the cache {len(self.counted)}, its contexts are of shape "
                f"{tuple(contexts.shape)}; valid: one length for each sequence"
            )
        if bool((contexts < 1).any()):
            raise ValueError(f"a context has {int(contexts.min())} tokens; valid: 1 or more")
        self.contexts = contexts
        rank = self.counted[:, None] + real.cumsum(1)
        context, last = real & (rank <= contexts[:, None]), real & (rank == contexts[:, None])
        self.counted = rank[:, -1]
        ends = torch.where(last.any(1), last.to(torch.uint8).argmax(1), -1)
        if bool(last.any()):
            self.split = max(self.split, self.get_seq_length() + int(ends.max()) + 1)
        return context, ends

    def settle(self) -> None:
        """Once the contexts of all rows are over, drop what isn't kept of them."""
        assert self.counted is not None and self.contexts is not None
        if not self.settled and bool((self.counted >= self.contexts).all()):
            self.settled = True
            for layer in self._own:
                layer.settle(self.split)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer; only while our own attention reads it.

        Raises:
            RuntimeError: the model runs without the method that this cache belongs to.
        """
        from chai.cascade_runtime import active_cache

        if active_cache() is not self:
            raise RuntimeError(
                "this CascadeCache lacks pruned tokens and heads: "
                "use it inside `with method(model):` of the method that made it"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Forget the sequences."""
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens, which must be after the context."""
        super().crop(tokens_to_remove)
        if self.counted is not None:  # of the rows' real tokens; after the context they no longer matter
            self.counted = self.counted + tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx`` (long ``[B]``)."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _map_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        self.counted = None if self.counted is None else select(self.counted)
        self.contexts = None if self.contexts is None else select(self.contexts)
