"""Prefill on the CPU: one matrix product for all members of a cluster.

A cluster with ``m`` members is ``A_c [T, S] @ V_c [S, m * D]``, where ``V_c`` holds its members' values side by side:
one large product instead of ``m`` small ones. Blocks of query rows keep the weights in the core's cache and skip the
keys that causality hides. A cluster of one has nothing to share, and stock attention is the faster for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.kernels.machine import product_dtype
from chai.kernels.plan import Cluster, HeadPlan
from chai.kernels.workers import run_tasks

BLOCK = 256  # query rows of a task: fewer make the products slow, more don't fit the core's cache


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
        _Row(query[row], key[row], value[row], clusters, scaling, own, out[row]).attend()
    return out


class _Row:
    """The attention of one row of the batch: ``query [k, T, D]``, ``key [n, S, D]``, ``value [H_value, S, D]``."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        clusters: list[Cluster],
        scaling: float,
        mask: Tensor | None,
        out: Tensor,
    ) -> None:
        self.query, self.key, self.value, self.mask, self.out = query, key, value, mask, out  # out is [T, H, D]
        self.scaling = scaling
        self.count, (_, self.length, self.size) = query.shape[1], value.shape
        self.group = out.shape[1] // value.shape[0]  # query heads of one value head
        self.exact = product_dtype(query.dtype, "cpu")
        stock = self._stock_is_faster()
        self.single = [cluster for cluster in clusters if stock and len(cluster.members) == 1]
        self.shared = [cluster for cluster in clusters if not (stock and len(cluster.members) == 1)]

    def _stock_is_faster(self) -> bool:
        """Whether clusters of one go to stock attention: it skips later keys only without an explicit mask."""
        plain = self.mask is None and self.query.shape[2] == self.size
        return plain and self.length - self.count <= self.count // 8 and self.exact == torch.float32

    def attend(self) -> None:
        """Fill ``out``: tasks of one single head, and of one cluster and one block of query rows."""
        if self.shared:
            self._prepare()
        blocks = range(0, self.count, BLOCK)[::-1]  # the longest first: no core begins one when the others are done
        tasks = [(cluster, -1) for cluster in range(len(self.single))]
        tasks += [(cluster, begin) for cluster in range(len(self.shared)) for begin in blocks]
        run_tasks(self._work, tasks)

    def _prepare(self) -> None:
        """Keys and joined values of the shared clusters, in the type that is multiplied fastest."""
        self.keys = [self.key[cluster.key_head].T.to(self.exact) for cluster in self.shared]
        self.joined, self.places = [], []
        for cluster in self.shared:
            # Members that read the same value head (grouped queries) have the same output, which is computed once.
            heads = sorted({member // self.group for member in cluster.members})
            together = self.value.new_empty(self.length, len(heads), self.size, dtype=self.exact)
            for place, head in enumerate(heads):
                together[:, place] = self.value[head]
            self.joined.append(together.flatten(1))
            self.places.append([(head, heads.index(head // self.group)) for head in cluster.members])
        self.later = torch.full((BLOCK, BLOCK), -torch.inf, dtype=self.exact).triu(1)

    def _work(self, tasks: Iterator[tuple[int, int]]) -> None:
        """What each core does until no task is left, in rooms of its own."""
        one = self.query.new_empty(2, self.length, self.size) if self.single else None
        widest = max((values.shape[1] for values in self.joined), default=0) if self.shared else 0
        room = torch.empty(BLOCK * (2 * self.length + widest) if self.shared else 0, dtype=self.exact)
        for cluster, begin in tasks:
            if begin < 0:
                assert one is not None
                self._single_head(self.single[cluster], one)
            else:
                self._block(cluster, begin, min(begin + BLOCK, self.count), room)

    def _single_head(self, cluster: Cluster, room: Tensor) -> None:
        """A head that stands for itself alone, by stock attention."""
        missing, head = self.length - self.count, cluster.members[0]
        query, key = self.query[cluster.index], room[0].copy_(self.key[cluster.key_head])
        if missing:  # stock attention is causal from the first key on: as many queries as keys
            room[1, :missing] = 0
            room[1, missing:] = query
            query = room[1]
        found = functional.scaled_dot_product_attention(
            query[None, None],
            key[None, None],
            self.value[None, None, head // self.group],
            is_causal=True,
            scale=self.scaling,
        )
        self.out[:, head] = found[0, 0, missing:]

    def _block(self, number: int, begin: int, end: int, room: Tensor) -> None:
        """Some query rows of a cluster."""
        cluster, values = self.shared[number], self.joined[number]
        rows, seen = end - begin, self.length - self.count + end
        size = rows * seen
        scores, weights = room[:size].view(rows, seen), room[size : 2 * size].view(rows, seen)
        found = room[2 * size : 2 * size + rows * values.shape[1]].view(rows, -1)
        query = self.query[cluster.index, begin:end].to(self.exact)
        torch.addmm(scores, query, self.keys[number][:, :seen], beta=0, alpha=self.scaling, out=scores)
        if self.mask is None:
            scores[:, seen - rows :] += self.later[:rows, :rows]
        elif self.mask.dtype == torch.bool:
            scores.masked_fill_(~self.mask[begin:end, :seen], torch.finfo(self.exact).min)
        else:
            scores += self.mask[begin:end, :seen]
        torch.softmax(scores, -1, out=weights)  # torch sums in fp32, whatever the type, and rounds once at the end
        torch.mm(weights, values[:seen], out=found)
        found = found.view(rows, -1, self.size)
        for head, place in self.places[number]:
            self.out[begin:end, head] = found[:, place]
