"""All rows and heads in a few batched products: decoding, and prefill of short sequences.

One token's scores are a product of a vector with each stored key head, so decoding reads ``k`` key heads and all
values once and nothing else of size: its limit is memory bandwidth, 2H / (H + k) of multi-head attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai.attention import causal_mask, take_heads
from chai.kernels.plan import HeadPlan


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, scaling: float, mask: Tensor | None
) -> Tensor:
    """Clustered attention with the weights of all heads in memory, ``[B, H, T, S]``.

    Args:
        query: ``[B, k, T, D]``, the representatives' queries.
        key: ``[B, n, S, D]``, the key heads that are stored; fastest where ``S`` is its contiguous axis.
        value: ``[B, H_value, S, D_value]``.
        plan: who reads what.
        scaling: factor of the scores.
        mask: ``[B or 1, 1, T, S]``, bool (true: attend) or additive; ``None`` means causal.

    Returns:
        ``[B, T, H, D_value]``.
    """
    rows, _, count, size = query.shape
    length, heads, stored = key.shape[2], plan.clusters.heads, plan.stored
    if plan.queries is not None:
        query = take_heads(query, plan.queries)
    query = (query * scaling).reshape(rows * stored, plan.width * count, size)
    scores = torch.bmm(query, key.transpose(2, 3).flatten(0, 1)).view(rows, -1, count, length)
    if mask is None and count > 1:
        mask = causal_mask(count, length, query.device)
    if mask is not None:
        if mask.dtype == torch.bool:
            # The least finite number, not -inf: a row that sees nothing (padding) becomes uniform instead of NaN.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = weights.view(-1, count, length).index_select(0, plan.weights)  # [B * H, T, S]
    weights = weights.view(rows * value.shape[1], -1, length)  # query heads of one value head share a product
    out = torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, count, -1)
    return out.transpose(1, 2)
