"""A KV cache of multi-head attention in growing buffers, for the model's own attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from chai.cache.buffer import TokenBuffer

RowSelection = Callable[[Tensor], Tensor]


class GrowingLayer(DynamicLayer):
    """One layer's keys and values in growing buffers; ``keys`` and ``values`` are views of them, ``[B, N, S, D]``.

    Args:
        reserve: Tokens to allocate at once.
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__()
        self.reserve = reserve
        self._clear()

    def _clear(self) -> None:
        self.key_buffer, self.value_buffer = TokenBuffer(self.reserve), TokenBuffer(self.reserve)

    def reset(self) -> None:
        """Forget the sequences."""
        super().reset()
        self._clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the live keys and values."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the buffers, spare room included."""
        return self.key_buffer.nbytes_allocated + self.value_buffer.nbytes_allocated

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens (``[B, N, T, D]`` each); returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.key_buffer.append(key_states)
        self.values = self.value_buffer.append(value_states)
        return self.keys, self.values

    def padded(self, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and one token's mask (``[B or 1, 1, 1, S]``), padded to a length that seldom changes.

        oneDNN, which multiplies half-precision matrices on a CPU, compiles a kernel for every new shape; that takes
        longer than the product, and the kernels fill megabytes for each decoded token.
        """
        keys, values, length = self.key_buffer.padded(), self.value_buffer.padded(), self.key_buffer.length
        padding = keys.shape[-2] - length
        if mask is None:
            visible = torch.arange(length + padding, device=keys.device) < length
            return keys, values, visible[None, None, None]
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return keys, values, functional.pad(mask, (0, padding), value=hidden)

    def select_rows(self, select: RowSelection) -> None:
        """Select, reorder or repeat the rows of the batch."""
        if self.get_seq_length() > 0:
            self.keys = self.key_buffer.replace(select)
            self.values = self.value_buffer.replace(select)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows by ``beam_idx`` (long ``[B]``)."""
        self.select_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.select_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self.select_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)  # checks the argument, and shortens the views
        kv_len = self.get_seq_length()
        if kv_len < self.key_buffer.length:
            self.keys = self.key_buffer.crop(kv_len)
            self.values = self.value_buffer.crop(kv_len)


class GrowingCache(Cache):
    """All keys and values, as in the stock ``DynamicCache``, which copies them at every token; this one seldom does.

    For multi-head attention: pass it to any model as ``past_key_values``, without a method. Layers with a sliding
    window keep all tokens, and their mask hides the old ones.

    Args:
        reserve: Tokens to allocate at once.
    """

    def __init__(self, reserve: int = 0) -> None:
        super().__init__(layer_class_to_replicate=cast("type[GrowingLayer]", partial(GrowingLayer, reserve)))
