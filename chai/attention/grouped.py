"""Clustered attention for prefill on a CPU: one matrix product for all members of a cluster.

A cluster with ``m`` members is ``A_c [T, S] @ V_c [S, m * D]``, where ``V_c`` holds the values of its members side by
side: one large product instead of ``m`` small ones. Blocks of queries keep the weights in the core's cache and skip the
keys that causality hides. A cluster of one has nothing to share; the fused kernel is faster for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.cpu import gemm_dtype, run_tasks
from chai.heads import Cluster, KVHeadMap

BLOCK = 256  # queries of a task: fewer make the products slow, more do not fit the core's cache


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: KVHeadMap,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """Compute clustered attention cluster by cluster, in blocks of queries.

    Arguments and result as in :func:`chai.attention.reference.clustered_attention`. A mask must hide every later token,
    as all masks of causal models do.
    """
    batch_size, _, q_len, _ = query.shape
    out = query.new_empty(batch_size, q_len, head_map.clusters.num_heads, value.shape[3])
    for row, clusters in enumerate(head_map.clusters_by_row):
        row_mask = None if mask is None else mask[row if len(mask) > 1 else 0, 0]
        _RowAttention(query[row], key[row], value[row], clusters, scaling, row_mask, softcap, out[row]).run()
    return out.transpose(1, 2)


class _RowAttention:
    """One row of the batch: query ``[k, T, D]``, key ``[n, S, D]``, value ``[H_kv, S, D]``; fills out ``[T, H, D]``."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        clusters: list[Cluster],
        scaling: float,
        mask: Tensor | None,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        self.query, self.key, self.value, self.scaling, self.mask, self.out = query, key, value, scaling, mask, out
        self.softcap = softcap
        self.q_len, (_, self.kv_len, self.head_dim) = query.shape[1], value.shape
        self.group = out.shape[1] // value.shape[0]  # query heads per KV head
        self.dtype = gemm_dtype(query.dtype, "cpu")
        # The fused kernel skips later keys only without an explicit mask, and cannot cap scores.
        plain = mask is None and softcap is None and query.shape[2] == self.head_dim
        fused = plain and self.kv_len - self.q_len <= self.q_len // 8 and self.dtype == torch.float32
        self.single = [cluster for cluster in clusters if fused and len(cluster.members) == 1]
        self.shared = [cluster for cluster in clusters if not (fused and len(cluster.members) == 1)]

    def run(self) -> None:
        """Fill ``out`` by tasks of one single head, or of one cluster and one block of queries."""
        if self.shared:
            self._join_values()
        blocks = range(0, self.q_len, BLOCK)[::-1]  # the longest first, so that all cores finish together
        tasks = [(cluster, -1) for cluster in range(len(self.single))]
        tasks += [(cluster, begin) for cluster in range(len(self.shared)) for begin in blocks]
        run_tasks(self._work, tasks)

    def _join_values(self) -> None:
        """Prepare the keys and the joined values of the shared clusters, in the fastest type."""
        self.keys = [self.key[cluster.kv_head].T.to(self.dtype) for cluster in self.shared]
        self.joined_values, self.columns = [], []
        for cluster in self.shared:
            # Members that read the same value head (grouped queries) have the same output: compute it once.
            heads = sorted({member // self.group for member in cluster.members})
            joined = self.value.new_empty(self.kv_len, len(heads), self.head_dim, dtype=self.dtype)
            for column, head in enumerate(heads):
                joined[:, column] = self.value[head]
            self.joined_values.append(joined.flatten(1))
            self.columns.append([(head, heads.index(head // self.group)) for head in cluster.members])
        self.later = torch.full((BLOCK, BLOCK), -torch.inf, dtype=self.dtype).triu(1)

    def _work(self, tasks: Iterator[tuple[int, int]]) -> None:
        pair = self.query.new_empty(2, self.kv_len, self.head_dim) if self.single else None
        widest = max((values.shape[1] for values in self.joined_values), default=0) if self.shared else 0
        scratch = torch.empty(BLOCK * (2 * self.kv_len + widest) if self.shared else 0, dtype=self.dtype)
        for cluster, begin in tasks:
            if begin < 0:
                assert pair is not None
                self._attend_single(self.single[cluster], pair)
            else:
                self._attend_block(cluster, begin, min(begin + BLOCK, self.q_len), scratch)

    def _attend_single(self, cluster: Cluster, scratch: Tensor) -> None:
        """Compute a head that represents only itself, by the fused kernel."""
        before, head = self.kv_len - self.q_len, cluster.members[0]
        query, key = self.query[cluster.index], scratch[0].copy_(self.key[cluster.kv_head])
        if before:  # the kernel is causal from the first key on: pad the queries to kv_len
            scratch[1, :before] = 0
            scratch[1, before:] = query
            query = scratch[1]
        output = functional.scaled_dot_product_attention(
            query[None, None],
            key[None, None],
            self.value[None, None, head // self.group],
            is_causal=True,
            scale=self.scaling,
        )
        self.out[:, head] = output[0, 0, before:]

    def _attend_block(self, index: int, begin: int, end: int, scratch: Tensor) -> None:
        """Compute the queries ``begin`` to ``end`` of a shared cluster."""
        cluster, values = self.shared[index], self.joined_values[index]
        rows, seen = end - begin, self.kv_len - self.q_len + end
        size = rows * seen
        scores, weights = scratch[:size].view(rows, seen), scratch[size : 2 * size].view(rows, seen)
        output = scratch[2 * size : 2 * size + rows * values.shape[1]].view(rows, -1)
        # Scores of the representative.
        query = self.query[cluster.index, begin:end].to(self.dtype)
        torch.addmm(scores, query, self.keys[index][:, :seen], beta=0, alpha=self.scaling, out=scores)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.mask is None:
            scores[:, seen - rows :] += self.later[:rows, :rows]
        elif self.mask.dtype == torch.bool:
            scores.masked_fill_(~self.mask[begin:end, :seen], torch.finfo(self.dtype).min)
        else:
            scores += self.mask[begin:end, :seen]
        torch.softmax(scores, -1, out=weights)  # torch sums in fp32, whatever the type, and rounds once at the end
        # One product with the values of all members.
        torch.mm(weights, values[:seen], out=output)
        output = output.view(rows, -1, self.head_dim)
        for head, column in self.columns[index]:
            self.out[begin:end, head] = output[:, column]
