"""Head clusters, and the map from query heads to the KV heads that a cache stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.kernels.tasks import Tasks, build_tasks


def take_heads(tensor: Tensor, heads: Tensor) -> Tensor:
    """Select heads row by row: ``[B, N, X, Y]`` and long ``[B, n]`` to ``[B, n, X, Y]``."""
    if len(heads) == 1:
        return tensor.index_select(1, heads[0])
    return tensor[torch.arange(len(heads), device=heads.device)[:, None], heads]


def repeat_kv(states: Tensor, num_heads: int, dim: int = 1) -> Tensor:
    """Repeat each KV head for the query heads that read it: ``[B, H_kv, S, D]`` to ``[B, H, S, D]``."""
    repeats = num_heads // states.shape[dim]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim)


@dataclass(frozen=True)
class HeadClusters:
    """Head clusters of one layer, for each row of the batch (ValueError: the shapes do not fit each other)."""

    assignment: Tensor  # [B, H] (long); assignment[b, h] in [0, k) is the cluster of head h in row b
    representatives: Tensor  # [B, k] (long); representatives[b, c] is a head of cluster c in row b

    def __post_init__(self) -> None:
        if self.assignment.ndim != 2 or self.representatives.ndim != 2:
            raise ValueError("assignment must be [B, H] and representatives [B, k]")
        if self.assignment.shape[0] != self.representatives.shape[0] or self.k > self.num_heads:
            raise ValueError(
                f"assignment {tuple(self.assignment.shape)} and representatives "
                f"{tuple(self.representatives.shape)} do not fit: equal batch sizes, at most H representatives"
            )

    @property
    def num_heads(self) -> int:
        """Number of query heads, H."""
        return self.assignment.shape[1]

    @property
    def k(self) -> int:
        """Number of clusters."""
        return self.representatives.shape[1]

    def repeat(self, batch_size: int, device: torch.device) -> HeadClusters:
        """Repeat the clusters of a single row for a batch."""
        tensors = (self.assignment, self.representatives)
        return HeadClusters(*(tensor.to(device).repeat(batch_size, 1) for tensor in tensors))

    def check(self) -> None:
        """Verify the values (reads the tensors: not for the hot path).

        Raises:
            ValueError: A label is outside ``[0, k)``, or a representative is not a member of its own cluster.
        """
        if not bool(((self.assignment >= 0) & (self.assignment < self.k)).all()):
            raise ValueError(f"assignment has labels outside [0, {self.k})")
        if not bool(((self.representatives >= 0) & (self.representatives < self.num_heads)).all()):
            raise ValueError(f"representatives has heads outside [0, {self.num_heads})")
        labels = torch.arange(self.k, device=self.assignment.device).expand_as(self.representatives)
        if not torch.equal(self.assignment.gather(1, self.representatives), labels):
            raise ValueError("a representative is not a member of its own cluster")


@dataclass(frozen=True)
class Cluster:
    """One cluster of one row."""

    index: int  # its place among the representatives
    kv_head: int  # the stored KV head that its representative reads
    members: tuple[int, ...]  # its query heads


@dataclass(frozen=True)
class KVHeadMap:
    """Head clusters, and which stored KV head each representative reads.

    The properties are computed once per map. Those that return Python values read the tensors.
    """

    clusters: HeadClusters  # the head clusters
    kv_heads: Tensor  # long [B, k], the KV head of each representative, as an index into the cache
    stored: Tensor  # long [B, n], the model's KV heads that the cache stores

    @classmethod
    def all_stored(cls, clusters: HeadClusters, num_kv_heads: int) -> KVHeadMap:
        """Build the map for a cache that stores all KV heads of the model."""
        representatives = clusters.representatives
        stored = torch.arange(num_kv_heads, device=representatives.device).expand(len(representatives), -1)
        return cls(clusters, representatives // (clusters.num_heads // num_kv_heads), stored)

    @classmethod
    def only_read(cls, clusters: HeadClusters, num_kv_heads: int, most: int | None = None) -> KVHeadMap:
        """Build the map for a cache that stores only the KV heads that a representative reads.

        ``most`` is a bound of how many these are in any row; with it no tensor is read (see :func:`pack_kv_heads`).
        """
        if num_kv_heads == clusters.num_heads:  # without grouped queries: one for each representative, in order
            index = torch.arange(clusters.k, device=clusters.representatives.device)
            return cls(clusters, index.expand_as(clusters.representatives), clusters.representatives)
        read = clusters.representatives // (clusters.num_heads // num_kv_heads)  # [B, k]
        return cls(clusters, *pack_kv_heads(read, num_kv_heads, most))

    @property
    def num_stored(self) -> int:
        """Number of KV heads in the cache."""
        return self.stored.shape[1]

    @cached_property
    def clusters_by_row(self) -> list[list[Cluster]]:
        """The clusters of each row, the largest first."""
        rows = []
        for labels, kv_heads in zip(self.clusters.assignment.tolist(), self.kv_heads.tolist(), strict=True):
            members: list[list[int]] = [[] for _ in kv_heads]
            for head, label in enumerate(labels):
                members[label].append(head)
            row = [Cluster(i, kv_heads[i], tuple(heads)) for i, heads in enumerate(members)]
            rows.append(sorted(row, key=lambda cluster: -len(cluster.members)))
        return rows

    @cached_property
    def representatives_by_row(self) -> list[list[int]]:
        """The representatives of each row; a single list if all rows have the same."""
        return _lists(self.clusters.representatives)

    @cached_property
    def stored_by_row(self) -> list[list[int]]:
        """The stored KV heads of each row; a single list if all rows have the same."""
        return _lists(self.stored)

    @cached_property
    def one_to_one(self) -> bool:
        """Whether the i-th representative reads the i-th stored KV head (always so without grouped queries)."""
        index = torch.arange(self.num_stored, device=self.kv_heads.device)
        return self.num_stored == self.clusters.k and torch.equal(self.kv_heads, index.expand_as(self.kv_heads))

    # The dense path multiplies each stored KV head with the queries of its readers: a grid of `num_stored` rows with
    # `max_readers` slots each.

    @cached_property
    def max_readers(self) -> int:
        """The most representatives of any row that read the same KV head."""
        if self.one_to_one:
            return 1
        return int(functional.one_hot(self.kv_heads, self.num_stored).sum(1).max())

    @cached_property
    def slots(self) -> Tensor:
        """Long ``[B, k]``: the slot of each representative in the grid."""
        if self.one_to_one:
            return self.kv_heads
        reads = functional.one_hot(self.kv_heads, self.num_stored)  # [B, k, n]
        rank = reads.cumsum(1).gather(2, self.kv_heads[..., None])[..., 0] - 1
        return self.kv_heads * self.max_readers + rank

    @cached_property
    def slot_representatives(self) -> Tensor | None:
        """Long ``[B, num_stored * max_readers]``: the representative in each slot; ``None`` if slot i has the i-th."""
        if self.one_to_one:
            return None
        index = torch.arange(self.clusters.k, device=self.kv_heads.device).expand_as(self.kv_heads)
        empty = self.kv_heads.new_zeros(len(self.kv_heads), self.num_stored * self.max_readers)
        return empty.scatter_(1, self.slots, index)

    @cached_property
    def head_slots(self) -> Tensor:
        """Long ``[B * H]``: the slot, counted over the whole batch, whose attention weights each query head uses."""
        slots = self.slots.gather(1, self.clusters.assignment)  # [B, H]
        first = torch.arange(len(slots), device=slots.device)[:, None] * (self.num_stored * self.max_readers)
        return (slots + first).flatten()

    def tasks(self, num_value_heads: int, members: int) -> Tasks:
        """Return the tasks of the GPU kernels, with up to ``members`` value heads each; built at the first use."""
        key = num_value_heads, members
        if key not in self._tasks:
            self._tasks[key] = build_tasks(self.clusters.assignment, self.kv_heads, num_value_heads, members)
        return self._tasks[key]

    @cached_property
    def _tasks(self) -> dict[tuple[int, int], Tasks]:
        return {}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> KVHeadMap:
        """Apply a selection of rows, or a move to another device, to all tensors."""
        clusters = HeadClusters(change(self.clusters.assignment), change(self.clusters.representatives))
        return KVHeadMap(clusters, change(self.kv_heads), change(self.stored))

    def to(self, device: torch.device) -> KVHeadMap:
        """Move to a device."""
        return self if self.stored.device == device else self.map_tensors(lambda tensor: tensor.to(device))


def pack_kv_heads(read: Tensor, num_kv_heads: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Choose the KV heads to store where only some are read.

    Every row stores the same number of KV heads, that of the row that needs the most; rows that need fewer repeat one.

    Args:
        read: Long ``[B, k]``, the KV head that each of k query heads reads.
        num_kv_heads: KV heads of the model.
        most: Number of KV heads to store, if it is known that no row needs more, such as ``min(k, num_kv_heads)``; the
            host then reads no tensor. By default the tensor tells.

    Returns:
        Long ``[B, k]``, the index of each of ``read`` among the stored ones, and long ``[B, n]``, the stored ones.

    Raises:
        ValueError: ``most`` is below 1.
    """
    if most is not None and most < 1:
        raise ValueError(f"{most} KV heads to store; valid: 1 or more")
    heads = torch.arange(num_kv_heads, device=read.device)
    needed = (read[..., None] == heads).any(1)  # [B, H_kv]
    most = int(needed.sum(1).max()) if most is None else most
    if most >= num_kv_heads:
        return read, heads.expand(len(read), -1)
    # A stable sort puts the needed heads of each row first, in their order.
    stored = (~needed).to(torch.uint8).argsort(stable=True, dim=1)[:, :most]
    stored = torch.where(needed.gather(1, stored), stored, stored[:, :1])
    return (needed.cumsum(1) - 1).gather(1, read), stored


def _lists(heads: Tensor) -> list[list[int]]:
    """Convert ``[B, n]`` to lists; to a single one if all rows are equal."""
    rows = heads.tolist()
    return rows[:1] if all(row == rows[0] for row in rows) else rows
