"""Clustered attention by torch's own fused kernel: each head's scores are computed from its representative's Q and K.

Nothing is saved in the scores, but a fused kernel on an accelerator never writes them to memory, which no plain
formulation of the clusters matches there. The cache and the projections save all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.attention import causal_mask, take_heads
from chai.kernels.plan import HeadPlan


def stock_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, scaling: float, mask: Tensor | None
) -> Tensor:
    """Arguments and result as in :func:`chai.kernels.dense.dense_attention`."""
    count, length = query.shape[2], value.shape[2]
    assignment = plan.clusters.assignment
    group, missing = assignment.shape[1] // value.shape[1], length - count
    query, causal = take_heads(query, assignment), mask is None and count > 1
    if causal and missing:
        if missing <= count // 8:  # causal from the first key on: the kernel then skips later keys
            query = functional.pad(query, (0, 0, missing, 0))
        else:
            mask, causal = causal_mask(count, length, query.device), False
    out = functional.scaled_dot_product_attention(
        query,
        take_heads(key, plan.key_heads.gather(1, assignment)),
        value if group == 1 else value.repeat_interleave(group, 1),
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
    )
    return out[:, :, -count:].transpose(1, 2)


def shared_values_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, scaling: float, mask: Tensor | None
) -> Tensor:
    """One head a cluster, whose output is all its members': ``y_h = A_r V_r`` (paper, Table 4, CHAI-QKV).

    That is multi-head attention of ``k`` heads, for which there is no faster path than the stock one. Arguments and
    result as in :func:`chai.kernels.dense.dense_attention`, but ``value`` is ``[B, n, S, D_value]``, the value heads of
    ``key``.
    """
    count, length = query.shape[2], key.shape[2]
    if not plan.in_order:
        key, value = take_heads(key, plan.key_heads), take_heads(value, plan.key_heads)
    if mask is None and 1 < count < length:
        mask = causal_mask(count, length, query.device)

    def stock() -> Tensor:
        causal = mask is None and count > 1
        fused = functional.scaled_dot_product_attention
        return fused(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling).transpose(1, 2)

    out = all_heads_attention(query, key, value, scaling, mask, stock)  # [B, T, k, D_value]
    return take_heads(out.transpose(1, 2), plan.clusters.assignment).transpose(1, 2)


def all_heads_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, stock: Callable[[], Tensor]
) -> Tensor:
    """Multi-head attention by the faster of the stock implementations; ``[B, T, H, D]``.

    torch's fused kernel decodes half-precision types on a CPU several times slower than plain products do.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_key, S, D]``.
        value: ``[B, H_key, S, D]``.
        scaling: factor of the scores.
        mask: ``[B or 1, 1, T, S]``; ``None`` means causal.
        stock: the fused kernel's result.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cpu" or not half or query.shape[2] != 1:
        return stock()
    rows, heads, _, size = query.shape
    grouped = (query * scaling).view(rows * key.shape[1], -1, size)
    scores = torch.bmm(grouped, key.flatten(0, 1).transpose(1, 2)).view(rows, heads, 1, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights.view(rows * value.shape[1], -1, key.shape[2]), value.flatten(0, 1)).view(
        rows, 1, heads, -1
    )
