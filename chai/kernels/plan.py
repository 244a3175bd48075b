"""How the heads of one layer share their attention, in the forms that the fast paths read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chai.clustering import HeadClusters


@dataclass(frozen=True)
class Cluster:
    """One cluster of one row: its place among the representatives, the key head it reads, its members."""

    index: int
    key_head: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class HeadPlan:
    """A membership, joined with which of the stored key heads each representative reads.

    Attributes:
        clusters: the membership, one row for each row of the batch.
        key_heads: long ``[B, k]``, the place in the cache of the key head that each representative reads.
        kept: long ``[B, n]``, the model's key heads that the cache holds.
    """

    clusters: HeadClusters
    key_heads: Tensor
    kept: Tensor

    @classmethod
    def with_all_keys(cls, clusters: HeadClusters, key_heads: int) -> HeadPlan:
        """For a cache that holds all ``key_heads`` of the model."""
        representatives = clusters.representatives
        kept = torch.arange(key_heads, device=representatives.device).expand(len(representatives), -1)
        return cls(clusters, representatives // (clusters.heads // key_heads), kept)

    @classmethod
    def with_read_keys(cls, clusters: HeadClusters, key_heads: int) -> HeadPlan:
        """For a cache that holds only the key heads, of the model's ``key_heads``, that a representative reads.

        Rows may need different numbers of them (grouped queries); the largest decides, other rows repeat one.
        """
        if key_heads == clusters.heads:
            own = torch.arange(clusters.k, device=clusters.representatives.device)
            return cls(clusters, own.expand_as(clusters.representatives), clusters.representatives)
        wanted = clusters.representatives // (clusters.heads // key_heads)  # [B, k]
        places, kept = read_key_heads(wanted, key_heads)
        return cls(clusters, places, kept)

    @property
    def stored(self) -> int:
        """Key heads in the cache."""
        return self.kept.shape[1]

    @cached_property
    def rows(self) -> list[list[Cluster]]:
        """For each row its clusters, the largest first (reads the tensors: once a membership, not once a call)."""
        result = []
        for labels, key_heads in zip(self.clusters.assignment.tolist(), self.key_heads.tolist(), strict=True):
            members: list[list[int]] = [[] for _ in key_heads]
            for head, label in enumerate(labels):
                members[label].append(head)
            row = [Cluster(i, key_heads[i], tuple(heads)) for i, heads in enumerate(members)]
            result.append(sorted(row, key=lambda cluster: -len(cluster.members)))
        return result

    @cached_property
    def representative_rows(self) -> list[list[int]]:
        """The heads whose queries are computed: one list, where all rows have the same, or one a row."""
        return _once(self.clusters.representatives)

    @cached_property
    def kept_rows(self) -> list[list[int]]:
        """The key heads whose keys are computed, like ``representative_rows``."""
        return _once(self.kept)

    @cached_property
    def in_order(self) -> bool:
        """Each representative reads a stored key head of its own, in this order (always without grouped queries)."""
        own = torch.arange(self.stored, device=self.key_heads.device)
        return self.stored == self.clusters.k and torch.equal(self.key_heads, own.expand_as(self.key_heads))

    @cached_property
    def width(self) -> int:
        """Most representatives of any row that read the same key head (1 without grouped queries)."""
        if self.in_order:
            return 1
        return int(torch.nn.functional.one_hot(self.key_heads, self.stored).sum(1).max())

    @cached_property
    def slots(self) -> Tensor:
        """Long ``[B, k]``: where each representative stands in a grid of ``stored x width`` queries."""
        if self.in_order:
            return self.key_heads
        reads = torch.nn.functional.one_hot(self.key_heads, self.stored)  # [B, k, n]
        rank = reads.cumsum(1).gather(2, self.key_heads[..., None])[..., 0] - 1
        return self.key_heads * self.width + rank

    @cached_property
    def queries(self) -> Tensor | None:
        """Long ``[B, stored * width]``: the representative in each slot of the grid; ``None`` where it is its own."""
        if self.in_order:
            return None
        size = self.stored * self.width
        own = torch.arange(self.clusters.k, device=self.key_heads.device).expand_as(self.key_heads)
        return self.key_heads.new_zeros(len(self.key_heads), size).scatter_(1, self.slots, own)

    @cached_property
    def weights(self) -> Tensor:
        """Long ``[B * H]``: for each head the place of its weights among those of all rows' slots."""
        slot = self.slots.gather(1, self.clusters.assignment)  # [B, H]
        first = torch.arange(len(slot), device=slot.device)[:, None] * (self.stored * self.width)
        return (slot + first).flatten()

    def map_rows(self, select: Callable[[Tensor], Tensor]) -> HeadPlan:
        """The same for a batch whose rows were selected, reordered or repeated (or moved to another device)."""
        clusters = HeadClusters(select(self.clusters.assignment), select(self.clusters.representatives))
        return HeadPlan(clusters, select(self.key_heads), select(self.kept))


def read_key_heads(wanted: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    """Which key heads to store where only some are read.

    Args:
        wanted: long ``[B, k]``, the key head that each of k query heads reads.
        key_heads: the model's.

    Returns:
        the place of each of ``wanted`` among the stored ones, ``[B, k]``, and those, ``[B, n]``: as many as the row
        with the most needs; other rows repeat one.
    """
    needed = torch.nn.functional.one_hot(wanted, key_heads).amax(1).bool()  # [B, key_heads]
    most = int(needed.sum(1).max())
    if most == key_heads:
        return wanted, torch.arange(key_heads, device=wanted.device).expand(len(wanted), -1)
    # A stable sort puts each row's needed heads first, in their own order.
    kept = (~needed).to(torch.uint8).argsort(stable=True, dim=1)[:, :most]
    kept = torch.where(needed.gather(1, kept), kept, kept[:, :1])
    return (needed.cumsum(1) - 1).gather(1, wanted), kept


def _once(heads: Tensor) -> list[list[int]]:
    """``[B, n]`` as lists; a single one if they are all the same."""
    rows = heads.tolist()
    return rows[:1] if all(row == rows[0] for row in rows) else rows
