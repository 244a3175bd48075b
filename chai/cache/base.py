"""Base of caches that a method prunes: their layers, and the state that the layers of a cache share.

The layers hold everything. So a ``DynamicCache`` of the caller can take them and keep its class, and what
``generate()`` does to a cache (reorder, repeat, select, crop) reaches the shared state through the first layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar, cast

from torch import Tensor
from transformers import Cache

from chai.cache.growing import GrowingLayer, RowSelection


class RequestState:
    """State of a batch of requests that all layers of a cache share."""

    def __init__(self, owner: object) -> None:
        self.owner = owner  # identifies the applied method; a cache is used only by an equal one
        self.attached = False  # whether a call of the model under that method is running
        self.reset()

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Let the layers be updated inside the block."""
        attached, self.attached = self.attached, True
        try:
            yield
        finally:
            self.attached = attached

    def reset(self) -> None:
        """Forget the sequences."""

    def select_rows(self, select: RowSelection) -> None:
        """Select, reorder or repeat rows of everything that is per row."""

    def crop(self, kv_len: int) -> None:
        """Forget the tokens from position ``kv_len`` on."""


class PrunedLayer(GrowingLayer):
    """One layer's keys and values of a method that prunes some, in growing buffers.

    Args:
        state: Shared by the layers of a cache.
        index: Of the layer; the first one passes changes of the batch on to the state.
        num_kv_heads: KV heads of the model.
        window: Sliding window of the layer in tokens, if it has one.
        reserve: Tokens to allocate at once.
    """

    def __init__(
        self, state: RequestState, index: int, num_kv_heads: int, window: int | None = None, reserve: int = 0
    ) -> None:
        super().__init__(reserve)
        self.state, self.index = state, index
        self.num_kv_heads, self.window = num_kv_heads, window

    def reset(self) -> None:
        """Forget the sequences."""
        super().reset()
        if self.index == 0:
            self.state.reset()

    @property
    def nbytes_mha(self) -> int:
        """Bytes that the stock cache holds for these tokens under multi-head attention.

        With a sliding window the stock cache drops older tokens and this layer does not, so past the window ``nbytes``
        may be the larger.
        """
        if self.keys is None or self.values is None:
            return 0
        kv_len = self.get_seq_length()
        full = (self.keys[:, :1, :1].nbytes + self.values[:, :1, :1].nbytes) * self.num_kv_heads
        limit = kv_len if self.window is None else self.window - 1  # the tokens that the next one still sees
        return full * min(kv_len, limit)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens (``[B, N, T, D]`` each); returns all.

        Raises:
            RuntimeError: The model runs without the method that this cache belongs to.
        """
        self.check_attached()
        return super().update(key_states, value_states)

    def check_attached(self) -> None:
        """Refuse an update by an attention that would misread what is stored."""
        if not self.state.attached:
            raise RuntimeError(
                "this cache has pruned keys or values: use it inside `with method(model):` of the method it belongs to"
            )

    def select_rows(self, select: RowSelection) -> None:
        """Select, reorder or repeat rows of everything that is per row."""
        super().select_rows(select)
        if self.index == 0:
            self.state.select_rows(select)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)
        if self.index == 0:
            self.state.crop(self.get_seq_length())


L = TypeVar("L", bound=PrunedLayer)
C = TypeVar("C", bound=Cache)


class PrunedCache(Cache, Generic[L]):
    """A KV cache of :class:`PrunedLayer` objects that share one state.

    A plain call of the model creates one. ``generate()`` creates a ``DynamicCache``, whose layers are replaced by ours:
    view it with ``ClusteredCache.of(cache)``. Build one with ``method.new_cache(model)`` to inspect it or to continue a
    conversation.
    """

    @classmethod
    def of(cls: type[C], cache: Cache) -> C:
        """View any cache with our layers, such as a ``DynamicCache`` that was passed to a patched model."""
        return cache if isinstance(cache, cls) else cls(layers=cache.layers)

    @property
    def pruned_layers(self) -> list[L]:
        """The layers."""
        return cast("list[L]", self.layers)

    @property
    def state(self) -> Any:
        """State that the layers share."""
        return self.pruned_layers[0].state

    @property
    def nbytes(self) -> int:
        """Bytes of the live keys and values of all layers."""
        return cache_bytes(self)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of all buffers, spare room included."""
        return allocated_bytes(self)

    @property
    def nbytes_mha(self) -> int:
        """Bytes that the stock cache holds for the same tokens under multi-head attention."""
        return cache_bytes_mha(self)


def cache_bytes(cache: Cache) -> int:
    """Sum the bytes of the live keys and values of any cache."""
    tensors = (tensor for layer in _layers(cache) for tensor in (layer.keys, layer.values))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def cache_bytes_mha(cache: Cache) -> int:
    """Sum the bytes that the stock cache holds for the same tokens under multi-head attention."""
    layers = _layers(cache)
    return sum(layer.nbytes_mha for layer in layers) if isinstance(layers[0], PrunedLayer) else cache_bytes(cache)


def allocated_bytes(cache: Cache) -> int:
    """Sum the bytes that a cache has allocated, spare room included."""
    layers = _layers(cache)
    return (
        sum(layer.nbytes_allocated for layer in layers) if isinstance(layers[0], GrowingLayer) else cache_bytes(cache)
    )


def vector_bytes(cache: Cache) -> int:
    """Return the bytes of one key of one head, in every sequence of the batch."""
    keys = _layers(cache)[0].keys
    return int(keys.shape[0] * keys.shape[3] * keys.element_size())


def append_random(cache: Cache, tokens: int) -> None:
    """Append random keys and values to every layer, for benchmarks."""
    for layer in _layers(cache):
        shapes = [(*tensor.shape[:2], tokens, tensor.shape[3]) for tensor in (layer.keys, layer.values)]
        new = [layer.keys.new_empty(shape).normal_() for shape in shapes]
        with layer.state.attach() if isinstance(layer, PrunedLayer) else nullcontext():
            layer.update(*new)


def stored_kv_heads(cache: Cache) -> list[int]:
    """Return the number of KV heads whose keys each layer stores."""
    return [layer.keys.shape[1] for layer in _layers(cache)]


def _layers(cache: Cache) -> list[Any]:
    return cache.layers
