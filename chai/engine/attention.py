"""The attention of a layer over the cache of reserved length: the one place that chooses an implementation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chai.attention import clustered_attention, mha_attention, shared_value_attention
from chai.attention.gpu import GpuInputs, attention_on_gpu
from chai.attention.reference import padded_mask
from chai.engine.layers import Layer
from chai.heads import take_heads
from chai.kernels.tasks import Tasks, build_tasks, fill_tasks


@dataclass(frozen=True)
class Visible:
    """Which keys of the cache the tokens of a pass see.

    Attributes:
        span: Keys that the attention is given: the first ``span`` of the cache.
        q_len: Tokens of the pass.
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
        return padded_mask(self.q_len, self.span, self.starts, self.kv_len, self.device)


def prepare(layer: Layer) -> None:
    """Bring what the kernels keep of a layer's clusters up to date, whenever these have changed.

    It stays where it is, for it is read by CUDA graphs.
    """
    if layer.clusters is None or layer.shares_values:  # every query head that is computed is a task of its own
        return
    for tasks in layer.tasks.values():
        fill_tasks(tasks, layer.clusters.assignment, layer.clusters.kv_heads)


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
    scaling, head_map = layer.shape.scaling, layer.head_map
    if visible.kernels:
        return _attend_on_gpu(query, key, value, layer, visible).transpose(1, 2)
    if head_map is None:
        return mha_attention(query, key, value, scaling, visible.mask)
    attend = shared_value_attention if layer.shares_values else clustered_attention
    return attend(query, key, value, head_map, scaling, visible.mask).transpose(1, 2)


def _refuse_capture(device: torch.device) -> None:
    """Refuse to allocate, within a CUDA graph, what outlives it: its memory is that of all graphs (RuntimeError)."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the attention of a CUDA graph chose other tasks than that of the run before it, which allocates them"
        )


def _attend_on_gpu(query: Tensor, key: Tensor, value: Tensor, layer: Layer, visible: Visible) -> Tensor:
    """Attend by the fastest implementation, which hides padding and spare room by itself: ``[B, H, T, D]``."""
    head_map, scaling, hidden = layer.head_map, layer.shape.scaling, (visible.starts, visible.kv_len)

    def find_tasks(members: int) -> Tasks:
        if members not in layer.tasks:
            _refuse_capture(query.device)
            if layer.clusters is None or layer.shares_values:
                assignment = torch.arange(query.shape[1], device=query.device).expand(len(query), -1)
                kv_heads = assignment // (query.shape[1] // key.shape[1])
            else:
                assignment, kv_heads = layer.clusters.assignment, layer.clusters.kv_heads
            layer.tasks[members] = build_tasks(assignment, kv_heads, value.shape[1], members)
        return layer.tasks[members]

    if head_map is None:
        return attention_on_gpu(GpuInputs(query, key, value, scaling, None, None, None, *hidden, find_tasks))
    if not layer.shares_values:
        return attention_on_gpu(GpuInputs(query, key, value, scaling, head_map, None, None, *hidden, find_tasks))
    # Multi-head attention of the representatives, whose outputs are those of their members.
    if layer.shape.group > 1:
        key, value = take_heads(key, head_map.kv_heads), take_heads(value, head_map.kv_heads)
    out = attention_on_gpu(GpuInputs(query, key, value, scaling, None, None, None, *hidden, find_tasks))
    return take_heads(out, head_map.clusters.assignment)
