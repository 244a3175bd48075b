"""Clustered attention in a few batched products over all heads: decoding, and prefill of short sequences.

The scores of one token are a product of a vector with each stored KV head, so decoding reads ``k`` key heads and all
values once and nothing else of size: its limit is memory bandwidth, 2H / (H + k) of multi-head attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai.attention.reference import cap_scores
from chai.cpu import gemm_dtype, keys_times_query
from chai.heads import KVHeadMap, take_heads

#: Attention weights of all heads that are handled at once: 4 MB, so that they stay in the cache between operations.
BLOCK_WEIGHTS = 1 << 20
#: The same on an accelerator, which has no such cache: 256 MB.
BLOCK_WEIGHTS_ON_GPU = 1 << 26


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: KVHeadMap,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """Compute clustered attention for as many rows and queries at a time as fit the CPU's cache.

    Arguments and result as in :func:`chai.attention.reference.clustered_attention`.
    """
    batch_size, _, q_len, _ = query.shape
    kv_len, num_heads, out_dtype = key.shape[2], head_map.clusters.num_heads, query.dtype
    # Bring the queries into the order of the KV heads that they read.
    if head_map.slot_representatives is not None:
        query = take_heads(query, head_map.slot_representatives)
    query = query * scaling
    if q_len > 1:  # the products of one token are bound by memory, in whatever type
        dtype = gemm_dtype(query.dtype, query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    block_weights = BLOCK_WEIGHTS if query.device.type == "cpu" else BLOCK_WEIGHTS_ON_GPU
    if batch_size * num_heads * q_len * kv_len <= block_weights:
        return _attend_block(query, key, value, head_map, head_map.head_slots, mask, softcap).to(out_dtype)
    # Split into blocks of rows and of queries.
    rows_at_once = max(1, min(batch_size, block_weights // (num_heads * q_len * kv_len)))
    queries_at_once = max(16, min(q_len, block_weights // (num_heads * kv_len)))
    head_slots = head_map.head_slots.view(batch_size, num_heads)
    outputs = []
    for row in range(0, batch_size, rows_at_once):
        rows = slice(row, row + rows_at_once)
        # Slots are counted over the whole batch: let those of this block begin at 0.
        slots = (head_slots[rows] - head_slots[row] // query.shape[1] * query.shape[1]).flatten()
        blocks = []
        for begin in range(0, q_len, queries_at_once):
            end = begin + queries_at_once
            seen = kv_len - q_len + min(end, q_len)
            block_mask = None if mask is None else mask[rows if len(mask) > 1 else slice(None), :, begin:end, :seen]
            inputs = query[rows, :, begin:end], key[rows, :, :seen], value[rows, :, :seen]
            block = _attend_block(*inputs, head_map, slots, block_mask, softcap)
            blocks.append(block.transpose(1, 2))  # as the output lies
        outputs.append(torch.cat(blocks, 1))
    return torch.cat(outputs).transpose(1, 2).to(out_dtype)


def _attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: KVHeadMap,
    head_slots: Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Attend for some rows and queries, ``[b, num_stored * max_readers, t, D]``, scaled, in the order of the KV heads.

    ``head_slots`` (long ``[b * H]``) is the slot of each head among those of this block.
    """
    batch_size, _, q_len, head_dim = query.shape
    kv_len, num_heads, num_stored = key.shape[2], head_map.clusters.num_heads, head_map.num_stored
    # Scores of the representatives: one product per stored KV head.
    query = query.reshape(batch_size * num_stored, head_map.max_readers * q_len, head_dim)
    key = key.flatten(0, 1)
    if q_len == 1 and keys_times_query(query.dtype):
        scores = torch.bmm(key, query.transpose(1, 2)).transpose(1, 2)
    else:
        scores = torch.bmm(query, key.transpose(1, 2))
    scores = cap_scores(scores.reshape(batch_size, -1, q_len, kv_len), softcap)
    # Mask: the least finite number, not -inf, so that a row that sees nothing (padding) is uniform instead of NaN.
    if mask is None and q_len > 1:
        later = torch.ones(q_len, q_len, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., kv_len - q_len :].masked_fill_(later, torch.finfo(scores.dtype).min)
    elif mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores += mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    # Every member takes the weights of its representative.
    weights = weights.view(-1, q_len, kv_len).index_select(0, head_slots)  # [b * H, t, s]
    # Multiply with the members' own values: query heads of one KV head share a product.
    weights = weights.view(batch_size * value.shape[1], -1, kv_len)
    return torch.bmm(weights, value.flatten(0, 1)).view(batch_size, num_heads, q_len, -1)
