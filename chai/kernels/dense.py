"""All heads of some rows in a few batched products: decoding, and prefill of short sequences.

One token's scores are a product of a vector with each stored key head, so decoding reads ``k`` key heads and all
values once and nothing else of size: its limit is memory bandwidth, 2H / (H + k) of multi-head attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai.attention import take_heads
from chai.kernels.machine import product_dtype, scores_by_rows
from chai.kernels.plan import HeadPlan

#: Weights of all heads that are handled at once: 4 MB, so that they stay in the cache from one operation to the next.
AT_ONCE = 1 << 20


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, scaling: float, mask: Tensor | None
) -> Tensor:
    """Clustered attention with the weights of all heads in memory, for as many rows and queries as fit the cache.

    Args:
        query: ``[B, k, T, D]``, the representatives' queries.
        key: ``[B, n, S, D]``, the key heads that are stored.
        value: ``[B, H_value, S, D_value]``.
        plan: who reads what.
        scaling: factor of the scores.
        mask: ``[B or 1, 1, T, S]``, bool (true: attend) or additive, hiding later tokens; ``None`` means causal.

    Returns:
        ``[B, T, H, D_value]``.
    """
    rows, _, count, _ = query.shape
    length, heads = key.shape[2], plan.clusters.heads
    if plan.queries is not None:
        query = take_heads(query, plan.queries)
    query = query * scaling
    if count > 1:  # one token's products are bound by memory, in whatever type
        exact = product_dtype(query.dtype, query.device.type)
        query, key, value = query.to(exact), key.to(exact), value.to(exact)
    if rows * heads * count * length <= AT_ONCE:
        return _block(query, key, value, plan, plan.weights, mask)
    together = max(1, min(rows, AT_ONCE // (heads * count * length)))
    block = max(16, min(count, AT_ONCE // (heads * length)))
    slots = plan.weights.view(rows, heads)
    parts = []
    for row in range(0, rows, together):
        own = slice(row, row + together)
        chosen = (slots[own] - slots[row] // query.shape[1] * query.shape[1]).flatten()
        blocks = []
        for begin in range(0, count, block):
            seen = length - count + min(begin + block, count)
            here = (
                None if mask is None else mask[own if len(mask) > 1 else slice(None), :, begin : begin + block, :seen]
            )
            inputs = query[own, :, begin : begin + block], key[own, :, :seen], value[own, :, :seen]
            blocks.append(_block(*inputs, plan, chosen, here))
        parts.append(torch.cat(blocks, 1))
    return torch.cat(parts)


def _block(query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, slots: Tensor, mask: Tensor | None) -> Tensor:
    """Some rows and queries; ``query`` is scaled and in the order of the key heads, ``slots`` is ``[B * H]``."""
    rows, _, count, size = query.shape
    length, heads, stored = key.shape[2], plan.clusters.heads, plan.stored
    query, key = query.reshape(rows * stored, plan.width * count, size), key.flatten(0, 1)
    if count == 1 and scores_by_rows(query.dtype):
        scores = torch.bmm(key, query.transpose(1, 2)).transpose(1, 2)
    else:
        scores = torch.bmm(query, key.transpose(1, 2))
    scores = scores.reshape(rows, -1, count, length)
    if mask is None and count > 1:
        later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., length - count :].masked_fill_(later, torch.finfo(scores.dtype).min)
    elif mask is not None and mask.dtype == torch.bool:
        # The least finite number, not -inf: a row that sees nothing (padding) becomes uniform instead of NaN.
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores += mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = weights.view(-1, count, length).index_select(0, slots)  # [B * H, T, S]
    weights = weights.view(rows * value.shape[1], -1, length)  # query heads of one value head share a product
    out = torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, count, -1)
    return out.transpose(1, 2)
