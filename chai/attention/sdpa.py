"""Clustered attention by the fused kernel of torch: each head is scored with the Q and K of its representative.

No scores are saved, but on an accelerator the fused kernel never writes them to memory, and no plain formulation of
the clusters is as fast there. The savings of cache and projections are the same.
"""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor

from chai.attention.reference import causal_mask
from chai.heads import KVHeadMap, repeat_kv, take_heads


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, head_map: KVHeadMap, scaling: float, mask: Tensor | None
) -> Tensor:
    """Arguments and result as in :func:`chai.attention.reference.clustered_attention`."""
    q_len, kv_len = query.shape[2], value.shape[2]
    assignment, before = head_map.clusters.assignment, kv_len - q_len
    query, causal = take_heads(query, assignment), mask is None and q_len > 1
    if causal and before:
        if before <= q_len // 8:  # pad the queries to be causal from the first key on: the kernel skips later keys
            query = functional.pad(query, (0, 0, before, 0))
        else:
            mask, causal = causal_mask(q_len, kv_len, query.device), False
    out = functional.scaled_dot_product_attention(
        query,
        take_heads(key, head_map.kv_heads.gather(1, assignment)),
        repeat_kv(value, assignment.shape[1]),
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
    )
    return out[:, :, -q_len:]
