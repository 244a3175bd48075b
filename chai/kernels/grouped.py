"""Prefill on the CPU: one matrix product for all members of a cluster.

A cluster with ``m`` members is ``A_c [T, S] @ V_c [S, m * D]``, where ``V_c`` holds its members' values side by side:
one large product instead of ``m`` small ones. Blocks of query rows keep the weights in the core's cache and skip the
keys that causality hides. A cluster of one has nothing to share, and stock attention is the faster for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.kernels.plan import Cluster, HeadPlan
from chai.kernels.workers import run_tasks

BLOCK = 256  # query rows of a task: fewer make the products slow, more don't fit the core's cache


@cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which this machine multiplies matrices of ``dtype`` fastest.

    Without instructions for bfloat16 or float16 their products are emulated, several times slower than float32's.
    """
    if dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, scaling: float, mask: Tensor | None
) -> Tensor:
    """Clustered attention by clusters and blocks of query rows; arguments and result as in ``dense_attention``.

    The mask must hide every later token, as all masks of causal models do.
    """
    rows, _, count, _ = query.shape
    out = query.new_empty(rows, count, plan.clusters.heads, value.shape[3])
    for row, clusters in enumerate(plan.rows):
        own = None if mask is None else mask[row if len(mask) > 1 else 0, 0]
        shared = clusters
        if _stock_is_faster(query, value, own):
            single = [cluster for cluster in clusters if len(cluster.members) == 1]
            if single:
                _single_heads(query[row], key[row], value[row], single, scaling, out[row])
            shared = [cluster for cluster in clusters if len(cluster.members) > 1]
        if shared:
            _shared_heads(query[row], key[row], value[row], shared, scaling, own, out[row])
    return out


def _stock_is_faster(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether clusters of one go to stock attention: it skips later keys only without an explicit mask."""
    count, length = query.shape[2], value.shape[2]
    plain = mask is None and query.shape[3] == value.shape[3] and length - count <= count // 8
    return plain and product_dtype(query.dtype) == torch.float32


def _single_heads(
    query: Tensor, key: Tensor, value: Tensor, clusters: list[Cluster], scaling: float, out: Tensor
) -> None:
    """Heads that stand for themselves alone, by stock attention; ``out`` is ``[T, H, D]``."""
    count, length = query.shape[1], value.shape[1]
    group = out.shape[1] // value.shape[0]
    heads = [cluster.members[0] for cluster in clusters]
    # Stock attention is causal from the first key on, so queries get as many rows as there are keys.
    padded = query.new_zeros(len(heads), length, query.shape[2])
    padded[:, length - count :] = query[[cluster.index for cluster in clusters]]
    keys = key[[cluster.key_head for cluster in clusters]].contiguous()
    values = value[[head // group for head in heads]]
    found = functional.scaled_dot_product_attention(
        padded[None], keys[None], values[None], is_causal=True, scale=scaling
    )
    for place, head in enumerate(heads):
        out[:, head] = found[0, place, length - count :]


def _shared_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    clusters: list[Cluster],
    scaling: float,
    mask: Tensor | None,
    out: Tensor,
) -> None:
    """Clusters of several heads: tasks of one cluster and one block of query rows each; ``out`` is ``[T, H, D]``."""
    count, (_, length, size) = query.shape[1], value.shape
    offset, group, exact = length - count, out.shape[1] // value.shape[0], product_dtype(query.dtype)
    query = (query.to(torch.promote_types(query.dtype, torch.float32)) * scaling).to(exact)
    key = key.transpose(1, 2).to(exact)
    # Members that read the same value head (grouped queries) have the same output, which is computed once.
    heads = [sorted({member // group for member in cluster.members}) for cluster in clusters]
    joined = []
    for wanted in heads:
        together = value.new_empty(length, len(wanted), size, dtype=exact)
        for place, head in enumerate(wanted):
            together[:, place] = value[head]
        joined.append(together.flatten(1))
    places = [
        [(head, wanted.index(head // group)) for head in cluster.members]
        for cluster, wanted in zip(clusters, heads, strict=True)
    ]
    later = torch.full((BLOCK, BLOCK), -torch.inf, dtype=exact).triu(1)
    widest = max(map(len, heads)) * size

    def work(tasks: Iterator[tuple[int, int]]) -> None:
        scores_room, weights_room = query.new_empty(2, BLOCK * length)
        out_room = query.new_empty(BLOCK * widest)
        for number, begin in tasks:
            cluster, values = clusters[number], joined[number]
            end = min(begin + BLOCK, count)
            rows, seen = end - begin, offset + end
            scores = scores_room[: rows * seen].view(rows, seen)
            torch.mm(query[cluster.index, begin:end], key[cluster.key_head, :, :seen], out=scores)
            if mask is None:
                scores[:, seen - rows :] += later[:rows, :rows]
            elif mask.dtype == torch.bool:
                scores.masked_fill_(~mask[begin:end, :seen], torch.finfo(exact).min)
            else:
                scores += mask[begin:end, :seen]
            weights = weights_room[: rows * seen].view(rows, seen)
            if exact == torch.float32:
                torch.softmax(scores, -1, out=weights)
            else:
                weights.copy_(torch.softmax(scores, -1, dtype=torch.promote_types(exact, torch.float32)))
            found = out_room[: rows * values.shape[1]].view(rows, -1)
            torch.mm(weights, values[:seen], out=found)
            found = found.view(rows, -1, size)
            for head, place in places[number]:
                out[begin:end, head] = found[:, place]

    # The longest first, so that no core starts a long task when the others are done.
    run_tasks(work, [(number, begin) for number in range(len(clusters)) for begin in range(0, count, BLOCK)[::-1]])
