"""The attention of a layer over the cache of reserved length: the one place that chooses an implementation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from chai.attention import clustered_attention, mha_attention, reference, shared_value_attention
from chai.attention.sdpa import sdpa_attention
from chai.engine.layers import Layer
from chai.heads import repeat_kv, take_heads


@dataclass(frozen=True)
class Visible:
    """Which keys of the cache the tokens of a pass see.

    Attributes:
        span: Keys that the attention is given: the first ``span`` of the cache.
        starts: int32 ``[B]``, padding tokens at the start of each row; ``None``: no row has any.
        kv_len: int32 ``[1]`` on the device, tokens in the cache, where these may be fewer than ``span``; only for
            passes of one token.
        kernels: Whether kernels compute the attention; else it may read tensors of the clusters.
    """

    span: int
    q_len: int
    starts: Tensor | None
    kv_len: Tensor | None
    device: torch.device
    kernels: bool

    @cached_property
    def mask(self) -> Tensor | None:
        """Bool ``[B or 1, 1, T, span]``, true: attend; ``None``: causal."""
        if self.starts is None and self.kv_len is None:
            return None
        key = torch.arange(self.span, device=self.device)
        query = torch.arange(self.span - self.q_len, self.span, device=self.device)[:, None]
        mask = (key <= query if self.kv_len is None else key[None] < self.kv_len)[None, None]
        if self.starts is not None:
            mask = mask & (key >= self.starts[:, None, None, None])
            if (
                self.kv_len is None
            ):  # padding sees itself: a softmax over nothing is NaN, which spreads through products
                mask = mask | (key == query)
        return mask


def prepare(layer: Layer) -> None:
    """Prepare what the attention needs of a layer's clusters, whenever they have changed."""


def prefill_attention(query: Tensor, layer: Layer, visible: Visible) -> Tensor:
    """Attend with the tokens of a prompt, which are the last of ``visible.span``.

    From ``[B, k, T, D]``, queries of the representatives (or of all heads), to ``[B, T, H, D]``.
    """
    return _attend(query, layer, visible)


def decode_attention(query: Tensor, layer: Layer, visible: Visible) -> Tensor:
    """Attend with one new token of each row: ``[B, k, 1, D]`` to ``[B, 1, H, D]``."""
    return _attend(query, layer, visible)


def warm_up_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attend among the warm-up tokens with all heads, causally.

    From query ``[B, H, w, D]``, key and value ``[B, H_kv, w, D]`` to ``[B, w, H, D]``.
    """
    return mha_attention(query, key, value, scaling, None)


def _attend(query: Tensor, layer: Layer, visible: Visible) -> Tensor:
    key, value = layer.keys[:, :, : visible.span], layer.values[:, :, : visible.span]
    scaling, mask = layer.shape.scaling, visible.mask
    if layer.head_map is None:
        if mask is None or not visible.kernels:
            return mha_attention(query, key, value, scaling, mask)
        key, value = repeat_kv(key, query.shape[1]), repeat_kv(value, query.shape[1])
        return functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2)
    head_map = layer.head_map
    if not visible.kernels:
        attend = shared_value_attention if layer.shares_values else clustered_attention
        return attend(query, key, value, head_map, scaling, mask).transpose(1, 2)
    if layer.shares_values:
        key, value = take_heads(key, head_map.kv_heads), take_heads(value, head_map.kv_heads)
        out = mha_attention(query, key, value, scaling, mask)  # [B, T, k, D]
        return take_heads(out.transpose(1, 2), head_map.clusters.assignment).transpose(1, 2)
    plain = reference.clustered_attention if query.shape[2] == 1 else sdpa_attention
    return plain(query, key, value, head_map, scaling, mask).transpose(1, 2)
