"""Cache layers that grow in place: keys and values of every head, with room for some more tokens behind the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers.cache_utils import DynamicLayer

#: Lengths that :meth:`GrowingLayer.padded` rounds up to.
ROUND = 64


class GrowingTensor:
    """Keys or values ``[B, N, S, D]`` to which tokens are appended, with room for some more behind the last.

    The whole is copied once in a while (a 32nd of its length) instead of at every token; so much of it is spare room.

    Attributes:
        length: tokens held.
        buffer: with the spare room; ``None`` while empty.
    """

    def __init__(self, reserve: int = 0) -> None:
        self.length = 0
        self.reserve = reserve
        self.buffer: Tensor | None = None

    @property
    def view(self) -> Tensor:
        """The tokens held."""
        assert self.buffer is not None
        return self.buffer.narrow(-2, 0, self.length)

    def append(self, new: Tensor) -> Tensor:
        """Add tokens; returns all."""
        count, needed = new.shape[-2], self.length + new.shape[-2]
        if torch.is_grad_enabled() and new.requires_grad:  # what a gradient may need isn't overwritten
            self.buffer = torch.cat([self.view, new], -2) if self.length else new
            self.length = needed
            return self.buffer
        if self.buffer is None or needed > self.buffer.shape[-2]:
            shape = list(new.shape)
            shape[-2] = self._room(needed)
            buffer = new.new_empty(shape)
            buffer.narrow(-2, needed, shape[-2] - needed).zero_()  # read by `padded`, so it must be numbers
            if self.length:
                buffer.narrow(-2, 0, self.length).copy_(self.view)
            self.buffer = buffer
        self.buffer.narrow(-2, self.length, count).copy_(new)
        self.length = needed
        return self.view

    def replace(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Let another dimension change (rows, heads); what ``change`` makes of the tokens held takes their place."""
        changed = change(self.view)
        self.buffer, self.length = None, 0
        return self.append(changed)

    def padded(self) -> Tensor:
        """The tokens held and as many numbers behind them as make their length a multiple of ``ROUND``."""
        assert self.buffer is not None
        return self.buffer.narrow(-2, 0, min(-(-self.length // ROUND) * ROUND, self.buffer.shape[-2]))

    def crop(self, length: int) -> Tensor:
        """Drop tokens from ``length`` on."""
        self.length = length
        return self.view

    def _room(self, needed: int) -> int:
        step = max(ROUND, needed // 32 // ROUND * ROUND)
        return max(-(-needed // step) * step, self.reserve)


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, all heads. ``keys`` and ``values`` are views of what is held, ``[B, N, S, D]``.

    Attributes:
        reserve: tokens to make room for at the start.
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__()
        self.reserve = reserve
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        super().reset()
        self.held_keys = GrowingTensor(self.reserve)
        self.held_values = GrowingTensor(self.reserve)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def nbytes_allocated(self) -> int:
        """The same with the spare room."""
        return sum(held.buffer.nbytes for held in (self.held_keys, self.held_values) if held.buffer is not None)

    @property
    def nbytes_mha(self) -> int:
        """Bytes that all key heads and all values of these tokens take."""
        return self.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens (``[B, N, T, D]`` each); returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.held_keys.append(key_states)
        self.values = self.held_values.append(value_states)
        return self.keys, self.values

    def padded(self, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and one token's mask (``[B or 1, 1, 1, S]`` or ``None``) for a length that seldom changes.

        oneDNN, which multiplies half-precision matrices on a CPU, compiles a kernel for every new shape, takes longer
        for that than for the product, and keeps it: megabytes for each token that is decoded.
        """
        keys, values, length = self.held_keys.padded(), self.held_values.padded(), self.held_keys.length
        more = keys.shape[-2] - length
        if mask is None:
            hidden = torch.arange(length + more, device=keys.device) < length
            return keys, values, hidden[None, None, None]
        least = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return keys, values, functional.pad(mask, (0, more), value=least)

    def map_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Let everything that is per row follow a change of the batch; ``select`` takes rows of any tensor."""
        if self.get_seq_length() > 0:
            self.keys = self.held_keys.replace(select)
            self.values = self.held_values.replace(select)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx`` (long ``[B]``)."""
        self.map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self.map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)  # checks, and drops views
        length = self.get_seq_length()
        if length < self.held_keys.length:
            self.keys = self.held_keys.crop(length)
            self.values = self.held_values.crop(length)
