"""The operations of a decoder layer apart from its products and its attention, in plain torch.

:mod:`chai.kernels.layer` has the same functions as kernels. None reads a tensor on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.heads import take_heads


def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add the residual and normalise: ``x + y`` (or ``x``), and ``weight * x / sqrt(mean(x ** 2) + eps)`` of it.

    Both ``[..., width]``. The mean is computed in fp32; the quotient is rounded before it is multiplied.
    """
    if y is not None:
        x = x + y
    return x, _normalise(x, weight, eps)


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    starts: Tensor | None = None,
    *,
    query_heads: Tensor | None = None,
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    skip: int = 0,
) -> Tensor:
    """Rotate queries and keys of new tokens, and store keys and values in the cache.

    Args:
        query: ``[B, T, N, D]``, of the product with the weights; ``key`` and ``value`` alike, with their own N.
        key: See ``query``.
        value: See ``query``.
        keys: ``[B, n, S, D]``, the cache.
        values: ``[B, n_v, S, D]``, the cache.
        cos: ``[S, D / 2]``, cosines of the positions; those of both halves of a head are the same.
        sin: ``[S, D / 2]``.
        position: int32 ``[1]`` on the device: the place of the first new token in the cache.
        starts: int32 ``[B]``, padding tokens at the start of each row, whose positions begin after them.
        query_heads: long ``[B, k]``, the heads to take from ``query``; ``None``: all.
        key_heads: long ``[B, n]``, those to take from ``key``.
        value_heads: long ``[B, n_v]``, those to take from ``value``.
        query_norm: ``[D]``, weight of the RMS norm of each head's query (Qwen 3).
        key_norm: ``[D]``, that of its key.
        eps: Of these norms.
        skip: Places of each row, from its first real token on, that are not written.

    Returns:
        The rotated queries, ``[B, k, T, D]``, the last dimension contiguous.
    """
    place = position.long() + torch.arange(query.shape[1], device=query.device)  # [T]
    turn = place[None] if starts is None else (place[None] - starts[:, None]).clamp(min=0)  # [B or 1, T]
    cos, sin = (functional.embedding(turn, table)[:, None] for table in (cos, sin))  # [B or 1, 1, T, D / 2]
    query, key, value = (
        _pick(states, heads) for states, heads in ((query, query_heads), (key, key_heads), (value, value_heads))
    )
    if query_norm is not None and key_norm is not None:
        query, key = _normalise(query, query_norm, eps), _normalise(key, key_norm, eps)
    key = _rotate(key, cos, sin)
    if skip:
        first = place.new_zeros(1) if starts is None else starts[:, None]
        kept = ((place >= first) & (place < first + skip)).view(-1, 1, len(place), 1)
        key = torch.where(kept, keys.index_select(2, place), key)
        value = torch.where(kept, values.index_select(2, place), value)
    keys.index_copy_(2, place, key)
    values.index_copy_(2, place, value)
    return _rotate(query, cos, sin)


def store_tokens(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
) -> None:
    """Copy the first tokens of each row into the cache, from its first real token on.

    From key and value ``[B, N, t, D]`` (heads taken by long ``[B, n]``) to ``[B, n, S, D]``; what would lie behind the
    cache's end is lost.
    """
    place = starts.long()[:, None] + torch.arange(key.shape[2], device=key.device)
    for states, heads, cache in ((key, key_heads, keys), (value, value_heads, values)):
        states = states if heads is None else take_heads(states, heads)
        index = place.clamp(max=cache.shape[2] - 1)[:, None, :, None].expand_as(states)
        cache.scatter_(2, index, states)


def gated_activation(product: Tensor, kind: str) -> Tensor:
    """Compute ``act(gate) * up`` from ``[..., 2 * neurons]`` (gate, then up); ``kind`` is ``silu`` or ``gelu_tanh``."""
    gate, up = product.chunk(2, -1)
    active = functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")
    return active.mul_(up)


def _pick(states: Tensor, heads: Tensor | None) -> Tensor:
    """From ``[B, T, N, D]`` to ``[B, n, T, D]``."""
    states = states.transpose(1, 2)
    return states if heads is None else take_heads(states, heads)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[B, N, T, D]``, whose halves are the coordinates of each plane."""
    first, second = states.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32:
        return functional.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
