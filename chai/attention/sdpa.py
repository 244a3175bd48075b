"""Clustered attention by the fused kernels of torch: each head is scored with the Q and K of its representative.

No scores are saved, but on an accelerator the fused kernel never writes them to memory, and no plain formulation of
the clusters is as fast there. The savings of cache and projections are the same. cuDNN's kernel also takes values that
are wider than keys: with the values of two members side by side, it computes their scores once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.attention.reference import causal_mask
from chai.heads import KVHeadMap, repeat_kv, take_heads
from chai.kernels.tasks import Tasks


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


def wide_sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, tasks: Tasks, scaling: float, mask: Tensor | None
) -> Tensor:
    """Compute two members of a cluster with one score: arguments and result as in :func:`sdpa_attention`.

    ``tasks`` are those of two members. Only without grouped queries, and for kernels that take values wider than keys.
    """
    batch_size, q_len, kv_len = len(value), query.shape[2], value.shape[2]
    num_heads, width = tasks.num_heads, value.shape[3]
    # Of each pair its query, its key head, the number of members, and the members.
    table = tasks.table.long()
    query, key = take_heads(query, table[..., 0]), take_heads(key, table[..., 1])
    members = torch.where(
        table[..., 2:3] > torch.arange(2, device=value.device), table[..., 3:5], num_heads
    )  # [B, N, 2]
    pairs = take_heads(value, members.clamp(max=num_heads - 1).flatten(1)).unflatten(1, (-1, 2))
    pairs = pairs.transpose(2, 3).flatten(3)  # [B, N, S, 2 D]
    if mask is None and 1 < q_len < kv_len:
        mask = causal_mask(q_len, kv_len, query.device)
    out = functional.scaled_dot_product_attention(
        query, key, pairs, attn_mask=mask, is_causal=mask is None and q_len > 1, scale=scaling
    )
    out = out.unflatten(3, (2, width)).transpose(2, 3).flatten(1, 2)  # [B, 2 N, T, D]
    # Find the place of each head among the pairs; empty places are written to an extra column.
    place = members.new_empty(batch_size, num_heads + 1)
    index = torch.arange(members[0].numel(), device=place.device).expand(batch_size, -1)
    place.scatter_(1, members.flatten(1), index)
    return take_heads(out, place[:, :num_heads])
