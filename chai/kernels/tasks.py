"""Divide the clusters of each row into tasks for the attention kernels, on the device.

A task computes the scores of one representative, and the outputs of up to ``G`` of its members from them. Members that
read the same value head (grouped queries) have the same output, which is computed once. So the number of tasks of a row
is at most ``k + (H - k) // G``, whatever the clusters are; tasks that are not needed are empty.

A task is ``3 + 2 G`` numbers: the query (index of the representative), the stored key head, the number of value heads,
these value heads, and for each of them the query heads in its group that take the output, as bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chai.kernels.compiler import Case, tl, triton


@dataclass(frozen=True)
class Tasks:
    """The tasks of all rows, for kernels with up to ``members`` value heads in a task."""

    table: Tensor  # int32 [B, N, 3 + 2 * members]
    leaders: Tensor  # int32 [B, H], the lowest head with the same output
    members: int  # G
    num_heads: int  # H
    group: int  # query heads for each value head

    @property
    def count(self) -> int:
        """Tasks of a row, empty ones included."""
        return self.table.shape[1]


def empty_tasks(
    batch_size: int, num_heads: int, k: int, num_value_heads: int, members: int, device: torch.device
) -> Tasks:
    """Allocate the tasks of ``k`` clusters of ``num_heads`` heads, each with up to ``members`` value heads."""
    count = k + (num_heads - k) // members
    table = torch.zeros(batch_size, count, 3 + 2 * members, dtype=torch.int32, device=device)
    leaders = torch.zeros(batch_size, num_heads, dtype=torch.int32, device=device)
    return Tasks(table, leaders, members, num_heads, num_heads // num_value_heads)


def fill_tasks(tasks: Tasks, assignment: Tensor, kv_heads: Tensor) -> None:
    """Write the tasks of an assignment (long ``[B, H]``); ``kv_heads`` (long ``[B, k]``) are the stored key heads."""
    batch_size, num_heads = assignment.shape
    _fill[(batch_size,)](
        assignment,
        kv_heads,
        tasks.table,
        tasks.leaders,
        tasks.count,
        *assignment.stride(),
        *kv_heads.stride(),
        HEADS=num_heads,
        HEADS_PADDED=triton.next_power_of_2(num_heads),
        MEMBERS=tasks.members,
        GROUP=tasks.group,
        num_warps=_num_warps(num_heads),
    )


def build_tasks(assignment: Tensor, kv_heads: Tensor, num_value_heads: int, members: int) -> Tasks:
    """Allocate and write the tasks of an assignment (long ``[B, H]``) with stored key heads (long ``[B, k]``)."""
    batch_size, num_heads = assignment.shape
    tasks = empty_tasks(batch_size, num_heads, kv_heads.shape[1], num_value_heads, members, assignment.device)
    fill_tasks(tasks, assignment, kv_heads)
    return tasks


def _num_warps(num_heads: int) -> int:
    """Return warps for matrices of heads, such that they fit the registers."""
    return 4 if num_heads <= 32 else min(32, (1 << (num_heads - 1).bit_length()) // 4)


@triton.jit(do_not_specialize=["count"])
def _fill(
    assignment,
    kv_heads,
    table,
    leaders,
    count,
    stride_ab,
    stride_ah,
    stride_kb,
    stride_kc,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0)
    WIDTH: tl.constexpr = 3 + 2 * MEMBERS
    # Labels of heads i (down) and j (across).
    i = tl.arange(0, HEADS_PADDED)[:, None]
    j = tl.arange(0, HEADS_PADDED)[None, :]
    label_i = tl.load(assignment + row * stride_ab + i * stride_ah, mask=i < HEADS, other=-1).to(tl.int32)
    label_j = tl.load(assignment + row * stride_ab + j * stride_ah, mask=j < HEADS, other=-2).to(tl.int32)
    same = label_i == label_j
    twins = same & (i // GROUP == j // GROUP)  # heads with the same output
    # The lowest head of each output leads it.
    leader = tl.min(tl.where(twins, j, HEADS_PADDED), 1)[:, None]
    leads_i = leader == i
    leads_j = tl.trans(leads_i.to(tl.int32)) != 0
    # Its rank in the cluster, and how many outputs the cluster has.
    rank_i = tl.sum((same & leads_j & (j < i)).to(tl.int32), 1)[:, None]
    outputs_i = tl.sum((same & leads_j).to(tl.int32), 1)[:, None]
    opens_j = tl.trans(tl.where(leads_i & (rank_i == 0), outputs_i, 0))
    # Tasks of the clusters before the own one.
    tasks_j = tl.where(j < HEADS, (opens_j + MEMBERS - 1) // MEMBERS, 0)
    first = tl.sum(tl.where(label_j < label_i, tasks_j, 0), 1)[:, None]
    used = tl.sum(tasks_j, 1)
    # Every leading head writes its place in its task; the first of a task writes the rest.
    entry = table + (row * count + first + rank_i // MEMBERS) * WIDTH
    slot, leads = rank_i % MEMBERS, leads_i & (i < HEADS)
    heads = tl.sum(tl.where(twins, 1 << (j % GROUP), 0), 1)[:, None]
    tl.store(entry + 3 + slot, i // GROUP, mask=leads)
    tl.store(entry + 3 + MEMBERS + slot, heads, mask=leads)
    opens = leads & (slot == 0)
    kv_head = tl.load(kv_heads + row * stride_kb + label_i * stride_kc, mask=opens, other=0).to(tl.int32)
    tl.store(entry, label_i, mask=opens)
    tl.store(entry + 1, kv_head, mask=opens)
    tl.store(entry + 2, tl.minimum(outputs_i - rank_i, MEMBERS), mask=opens)
    tl.store(leaders + row * HEADS + i, leader, mask=i < HEADS)
    # Tasks that are not needed.
    rest = tl.arange(0, HEADS_PADDED)
    tl.store(table + (row * count + rest) * WIDTH + 2, 0, mask=(rest >= tl.max(used, 0)) & (rest < count))


COMPILED = [
    Case(
        f"tasks, {heads} heads, {members} members",
        _fill,
        {"assignment": "*i64", "kv_heads": "*i64", "table": "*i32", "leaders": "*i32"}
        | dict.fromkeys(("count", "stride_ab", "stride_ah", "stride_kb", "stride_kc"), "i32"),
        {"HEADS": heads, "HEADS_PADDED": 1 << (heads - 1).bit_length(), "MEMBERS": members, "GROUP": group},
        {"num_warps": _num_warps(heads)},
    )
    for heads, members, group in ((32, 2, 1), (52, 2, 1), (72, 8, 1), (32, 4, 4))
]
