"""Clustered head attention: its equation as a slow, plain reference, and the one function that takes the fast paths.

Multi-head attention (paper, section 2) computes for every head h

    A_h = softmax(scaling * Q_h K_h^T),     y_h = A_h V_h.

Clustered head attention (section 3.4) computes A only for the representative r(c) of each cluster c and reuses it for
every member, with the member's own V:

    y_h = A_{r(c(h))} V_h.

Shapes: B rows, H query heads, k representatives, T query tokens, S key tokens, D head size. With grouped-query
attention there are fewer key and value heads than query heads; query head h reads key head ``h // (H / H_key)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai.clustering import HeadClusters


def attention_weights(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """``softmax(scaling * Q K^T + mask)`` in fp32, returned in the query's dtype.

    Args:
        query: ``[B, N, T, D]``.
        key: ``[B, N, S, D]``; its last T tokens are the query's.
        scaling: factor of the scores.
        mask: ``[B or 1, 1, T, S]``, bool (true: attend) or additive float; ``None`` means causal.

    Returns:
        ``[B, N, T, S]``. A row that may attend to nothing (padding) is uniform, not NaN.
    """
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if mask is None:
        mask = causal_mask(query.shape[-2], key.shape[-2], query.device)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return scores.softmax(-1).to(query.dtype)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool ``[1, 1, T, S]``: the last ``T`` of ``S`` tokens see themselves and everything before them."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def apply_weights(weights: Tensor, value: Tensor) -> Tensor:
    """``A V`` with grouped values: ``[B, H, T, S]`` and ``[B, H_value, S, D]`` to ``[B, H, T, D]``."""
    grouped = weights.unflatten(1, (value.shape[1], -1))
    return (grouped @ value[:, :, None]).flatten(1, 2)


def expand_heads(key: Tensor, heads: int) -> Tensor:
    """Key heads repeated for their query heads: ``[B, H_key, S, D]`` to ``[B, H, S, D]``."""
    return key.repeat_interleave(heads // key.shape[1], 1)


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    clusters: HeadClusters,
    scaling: float | None = None,
    mask: Tensor | None = None,
    key_heads: Tensor | None = None,
) -> Tensor:
    """Attention with one head per cluster (paper, section 3.4), by the fastest path for these shapes.

    Args:
        query: ``[B, H, T, D]``; only the representatives' heads are read.
        key: ``[B, H_key, S, D]``, the key heads that are kept.
        value: ``[B, H_value, S, D_value]``; ``H_value`` divides ``H``.
        clusters: the membership, one row for each row of the batch.
        scaling: factor of the scores; ``D ** -0.5`` if not given.
        mask: ``[B or 1, 1, T, S]``, bool (true: attend) or additive float, hiding later tokens; ``None``: just causal.
        key_heads: ``[B, k]`` (long), which head of ``key`` each representative reads; if not given, ``key`` holds all
            the model's key heads.

    Returns:
        ``[B, H, T, D_value]``.

    Raises:
        ValueError: shapes that don't fit each other (stock kernels would broadcast some of them silently).
    """
    from chai.kernels import attend
    from chai.kernels.plan import HeadPlan

    key_heads = _check(query, key, value, clusters, key_heads)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kept = torch.arange(key.shape[1], device=key.device).expand(len(key), -1)
    chosen = take_heads(query, clusters.representatives)
    return attend(chosen, key, value, HeadPlan(clusters, key_heads, kept), scaling, mask).transpose(1, 2)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    clusters: HeadClusters,
    scaling: float | None = None,
    mask: Tensor | None = None,
    key_heads: Tensor | None = None,
) -> Tensor:
    """The equation, step by step; arguments, result and errors as in :func:`clustered_attention`."""
    key_heads = _check(query, key, value, clusters, key_heads)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = attention_weights(
        take_heads(query, clusters.representatives), take_heads(key, key_heads), scaling, mask
    )  # [B, k, T, S]
    return apply_weights(take_heads(weights, clusters.assignment), value)


def _check(query: Tensor, key: Tensor, value: Tensor, clusters: HeadClusters, key_heads: Tensor | None) -> Tensor:
    """Verify the shapes; returns which head of ``key`` each representative reads."""
    rows, heads, _, size = query.shape
    if clusters.assignment.shape != (rows, heads):
        raise ValueError(
            f"clusters are for {tuple(clusters.assignment.shape)} rows and heads, query has {(rows, heads)}"
        )
    _check_heads("value", value, heads)
    if key_heads is None:
        _check_heads("key", key, heads)
        key_heads = clusters.representatives // (heads // key.shape[1])
    if key_heads.shape != clusters.representatives.shape:
        raise ValueError(f"key_heads is {tuple(key_heads.shape)}, expected {tuple(clusters.representatives.shape)}")
    if key.shape[0] != rows or key.shape[2] != value.shape[2] or key.shape[3] != size:
        raise ValueError(f"key {tuple(key.shape)} doesn't fit query {tuple(query.shape)}, value {tuple(value.shape)}")
    return key_heads


def take_heads(tensor: Tensor, heads: Tensor) -> Tensor:
    """The given heads of each row: ``[B, N, X, Y]`` and ``[B, n]`` (long) to ``[B, n, X, Y]``."""
    if len(heads) == 1:
        return tensor.index_select(1, heads[0])
    return tensor[torch.arange(len(heads), device=heads.device)[:, None], heads]


def _check_heads(name: str, tensor: Tensor, heads: int) -> None:
    if tensor.ndim != 4 or heads % tensor.shape[1] != 0:
        raise ValueError(f"{name} is {tuple(tensor.shape)}: expected [B, N, S, D] with N dividing {heads} query heads")
