"""The equations of multi-head and clustered head attention.

Multi-head attention (paper, Section 2) computes for every head h

    A_h = softmax(scaling * Q_h K_h^T),     y_h = A_h V_h.

Clustered head attention (Section 3.4) computes A only for the representative r(c) of each cluster c, and reuses it for
every member with the member's own V:

    y_h = A_{r(c(h))} V_h.

This module is what runs where gradients are wanted and on devices without a faster path; the fast paths
(:mod:`chai.attention.dense`, ``grouped`` and ``sdpa``) are tested against it.

With a soft cap c (Gemma 2), ``A_h = softmax(c tanh(scaling * Q_h K_h^T / c))``: scores stay between -c and c.

Shapes: B batch size, H query heads, H_kv KV heads, k representatives, n stored KV heads, T query tokens, S key tokens,
D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai.heads import KVHeadMap, take_heads


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: KVHeadMap,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """Compute clustered head attention by the equation (paper, Section 3.4).

    Args:
        query: ``[B, k, T, D]``, queries of the representatives.
        key: ``[B, n, S, D]``, the stored KV heads.
        value: ``[B, H_kv, S, D_value]``, the values of all KV heads.
        head_map: The clusters, and the stored KV head of each representative.
        scaling: Factor of the scores.
        mask: ``[B or 1, 1, T, S]``, bool (true: attend) or additive float; ``None`` means causal.
        softcap: Bound of the scores, applied before the mask; ``None``: unbounded.

    Returns:
        ``[B, H, T, D_value]``.
    """
    key = take_heads(key, head_map.kv_heads)  # [B, k, S, D]
    weights = attention_weights(query, key, scaling, mask, softcap)  # A_r: [B, k, T, S]
    weights = take_heads(weights, head_map.clusters.assignment)  # A_{r(c(h))}: [B, H, T, S]
    return apply_weights(weights, value)  # y_h: [B, H, T, D_value]


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """Bound scores smoothly, ``softcap * tanh(scores / softcap)``; ``None``: leave them alone."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attention_weights(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Compute ``softmax(scaling * Q K^T + mask)`` in fp32, returned in the dtype of the query.

    Args:
        query: ``[B, N, T, D]``.
        key: ``[B, N, S, D]``; its last T tokens are those of the query.
        scaling: Factor of the scores.
        mask: ``[B or 1, 1, T, S]``, bool (true: attend) or additive float; ``None`` means causal.
        softcap: Bound of the scores, applied before the mask; ``None``: unbounded.

    Returns:
        ``[B, N, T, S]``. A row that may attend to nothing (padding) is uniform, not NaN.
    """
    scores = cap_scores((query @ key.transpose(-1, -2)).float() * scaling, softcap)
    if mask is None:
        mask = causal_mask(query.shape[-2], key.shape[-2], query.device)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return scores.softmax(-1).to(query.dtype)


def apply_weights(weights: Tensor, value: Tensor) -> Tensor:
    """Compute ``A V`` with grouped values: ``[B, H, T, S]`` and ``[B, H_kv, S, D]`` to ``[B, H, T, D]``."""
    grouped = weights.unflatten(1, (value.shape[1], -1))
    return (grouped @ value[:, :, None]).flatten(1, 2)


def padded_mask(q_len: int, kv_len: int, starts: Tensor | None, length: Tensor | None, device: torch.device) -> Tensor:
    """Return bool ``[B or 1, 1, T, S]`` (true: attend) for left padding and a cache with room behind its tokens.

    Args:
        q_len: T; the last T of S tokens, unless ``length`` is given.
        kv_len: S.
        starts: int32 ``[B]``, the first token of each row that is not padding.
        length: int32 ``[1]`` on the device, tokens to attend to, for a single query.
        device: Of the mask.
    """
    places = torch.arange(kv_len, device=device)
    mask = causal_mask(q_len, kv_len, device) if length is None else (places < length)[None, None, None]
    if starts is None:
        return mask
    mask = mask & (places >= starts[:, None, None, None])
    if length is None:  # padding sees itself: a softmax over nothing is NaN, which spreads through products
        mask = mask | (places == places[kv_len - q_len :, None])
    return mask


def causal_mask(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Return bool ``[1, 1, T, S]``: each of the last T of S tokens sees itself and all tokens before it."""
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)[None, None]
