"""The first tokens of each row: with all heads, by which each layer clusters its heads.

By causality they depend neither on later tokens nor on the clusters. So they go through the layers as a chain of their
own, in each layer ahead of the whole prompt, which then runs on the representatives alone. Up to the first layer with
clusters the prompt computes the same, and the chain begins there with the prompt's states. On a CUDA device the chain
has a stream of its own, and the prompt waits in each layer for the layer's clusters only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from chai.engine import attention
from chai.engine.decoder import Decoder
from chai.engine.layers import Layer
from chai.methods.clustering import ClusteringMethod


class WarmUp:
    """The chain of a batch's warm-up tokens; reused for each request."""

    def __init__(self, decoder: Decoder, method: ClusteringMethod) -> None:
        self._decoder, self._method, self.tokens = decoder, method, method.warmup_tokens
        shape, rows = decoder.shape, decoder.batch_size
        like, size = decoder.embedding, (self.tokens, shape.head_dim)
        self._keys = like.new_empty(rows, shape.num_kv_heads, *size)
        self._values = torch.empty_like(self._keys)
        #: Normalised hidden states after the last layer, ``[B, tokens, width]``.
        self.hidden = like.new_empty(rows, self.tokens, like.shape[1])
        self._x: Tensor = self.hidden
        self._y: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        if decoder.device.type == "cuda":
            # Its many small kernels go first: they must stay ahead of the prompt's few large ones.
            self._stream = torch.cuda.Stream(decoder.device, priority=-1)
            self._events = [torch.cuda.Event() for _ in decoder.layers]
            self._done = torch.cuda.Event()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def begin(self) -> None:
        """Start with the tokens of ``decoder.sequence`` from ``decoder.starts`` on."""
        ids = self._decoder.sequence.t().gather(1, self._places().clamp(max=self._decoder.capacity))
        self.begin_with(self._decoder.embed(ids))

    def begin_after(self, x: Tensor, y: Tensor | None) -> None:
        """Start with the prompt's states ``x + y``, ``[B, T, width]``, where each row has all of its warm-up tokens."""
        index = self._places()[..., None].expand_as(self.hidden)
        states = x.gather(1, index)
        self.begin_with(states if y is None else states + y.gather(1, index))

    def begin_with(self, states: Tensor) -> None:
        """Start with the hidden states ``[B, tokens, width]`` of the warm-up tokens."""
        if self._stream is None:
            self.hidden.copy_(states)
        else:  # a copy that stays: memory of one stream must not be freed while another reads it
            current = torch.cuda.current_stream(self._decoder.device)
            current.wait_stream(self._stream)  # of a request that was broken off
            self.hidden.copy_(states)
            self._stream.wait_stream(current)
        self._x, self._y = self.hidden, None

    def _places(self) -> Tensor:
        """Return the places of the warm-up tokens, long ``[B, tokens]``."""
        return self._decoder.starts.long()[:, None] + torch.arange(self.tokens, device=self._decoder.device)

    def advance(self, layer: Layer, shared: bool, leave: bool) -> None:
        """Run one layer: cluster its heads, and write the warm-up tokens' keys and values into its cache.

        Its outputs are computed if ``leave``: a later layer needs them, or :meth:`finish`.

        What is launched afterwards on the current stream runs behind the clusters, keys and values, but not behind the
        outputs, which only the chain itself reads.
        """
        with self._aside():
            self._run(layer, shared, leave)
        if self._stream is not None:
            torch.cuda.current_stream(self._decoder.device).wait_event(self._events[layer.index])

    def _mark_ready(self, layer: Layer) -> None:
        """Note that what has been launched so far is all that the prompt needs of a layer."""
        if self._stream is not None:
            self._events[layer.index].record(self._stream)

    def finish(self) -> None:
        """Compute :attr:`hidden`."""
        with self._aside():
            self.hidden.copy_(self._decoder.last_norm(self._x, self._y))
            if self._stream is not None:
                self._done.record(self._stream)
        if self._stream is not None:
            torch.cuda.current_stream(self._decoder.device).wait_event(self._done)

    def last_hidden(self, length: int) -> Tensor:
        """Return the states of each row's last token of ``length``, ``[B, width]`` (of its last warm-up token)."""
        last = (length - 1 - self._decoder.starts.long()).clamp(max=self.tokens - 1)
        return self.hidden.gather(1, last[:, None, None].expand(-1, 1, self.hidden.shape[2]))[:, 0]

    def _run(self, layer: Layer, shared: bool, leave: bool) -> None:
        decoder, clusters, scaling = self._decoder, layer.clusters, self._decoder.shape.scaling
        x, hidden = decoder.enter(layer, self._x, self._y)
        projected = layer.weights.project_all(hidden)
        query = decoder.rotate_and_store(layer, projected, self._keys, self._values, decoder.zero, None)
        if clusters is not None:
            rows = slice(0, 1 if shared else None)
            (found,) = self._method.cluster_heads(
                [layer.index], [layer.k], query[None, rows], self._keys[None, rows], scaling
            )
            layer.set_clusters(found, shared)
            attention.prepare(layer)
        stored = None if clusters is None else clusters.stored
        decoder.operations.store_tokens(
            self._keys,
            self._values,
            layer.keys,
            layer.values,
            decoder.starts,
            stored,
            stored if layer.shares_values else None,
        )
        self._mark_ready(layer)
        if leave:
            heads = attention.warm_up_attention(query, self._keys, self._values, scaling)
            self._x, self._y = decoder.leave(layer, x, heads)


def cluster_without_tokens(decoder: Decoder, method: ClusteringMethod) -> None:
    """Set the clusters of a method that knows them before the first token."""
    shape = decoder.shape
    query, key = (
        torch.empty(1, 1, heads, 0, 1, device=decoder.device) for heads in (shape.num_heads, shape.num_kv_heads)
    )
    for layer in decoder.layers:
        if layer.clusters is not None:
            (found,) = method.cluster_heads([layer.index], [layer.k], query, key, 1.0)
            layer.set_clusters(found, shared=True)
            attention.prepare(layer)
