"""Random shapes of clustered attention, and the equation in fp64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from chai.heads import HeadClusters, KVHeadMap


@dataclass
class Problem:
    query: Tensor  # [B, k, T, D]
    key: Tensor  # [B, n, S, D]
    value: Tensor  # [B, H_kv, S, D_value]
    head_map: KVHeadMap
    scaling: float
    mask: Tensor | None
    starts: Tensor | None  # int32 [B]
    kv_len: Tensor | None  # int32 [1]
    softcap: float | None

    @property
    def assignment(self) -> Tensor:
        return self.head_map.clusters.assignment


def random_problem(seed: int, one_token: bool) -> Problem:
    """Draw rows, heads, clusters, grouped queries, head sizes, types, lengths, padding and masks."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    num_heads = draw.choice([1, 2, 3, 4, 6])
    group = draw.choice([size for size in (1, 2, 3) if num_heads % size == 0])
    batch_size, k, stored = draw.choice([1, 1, 2]), draw.randint(1, num_heads), draw.randint(1, 3)
    dim = draw.choice([16, 32, 64, 80, 96, 128])
    value_dim = draw.choice([dim, dim, dim, 32])
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32])
    size = draw.choice([1, 5, 16, 17, 40, 64, 70])
    q_len = 1 if one_token else draw.randint(1, min(size, 40))
    rows = [
        torch.cat([torch.arange(k), torch.randint(k, (num_heads - k,))])[torch.randperm(num_heads)]
        for _ in range(batch_size)
    ]
    assignment = torch.stack(rows)
    representatives = torch.stack([torch.stack([(row == c).nonzero()[0, 0] for c in range(k)]) for row in rows])
    kv_heads = torch.randint(stored, (batch_size, k))
    head_map = KVHeadMap(
        HeadClusters(assignment, representatives), kv_heads, torch.arange(stored).expand(batch_size, -1)
    )

    def tokens(count: int, heads: int, width: int, spare: int) -> Tensor:  # as a cache or a projection lays them out
        if draw.random() < 0.5:
            return torch.randn(batch_size, heads, count + spare, width).to(dtype)[:, :, :count]
        return torch.randn(batch_size, count + spare, heads, width).to(dtype)[:, :count].transpose(1, 2)

    query, key = tokens(q_len, k, dim, 0), tokens(size, stored, dim, 8)
    value = tokens(size, num_heads // group, value_dim, 8)
    kind = draw.choice(["none", "none", "starts", "bool", "additive"])
    mask = starts = kv_len = None
    visible = torch.rand(draw.choice([1, batch_size]), 1, q_len, size) < 0.7
    visible |= torch.eye(size, dtype=torch.bool)[-q_len:]  # every token sees itself
    visible &= torch.ones(q_len, size, dtype=torch.bool).tril(size - q_len)  # and no later one
    if kind == "bool":
        mask = visible
    if kind == "additive":
        hidden = draw.choice([torch.finfo(dtype).min, -torch.inf])
        mask = torch.randn(visible.shape).masked_fill(~visible, hidden).to(dtype)
    if kind == "starts":
        starts = torch.randint(0, size, (batch_size,), dtype=torch.int32)
    if one_token and mask is None and draw.random() < 0.5:
        least = 1 if starts is None else int(starts.max()) + 1
        kv_len = torch.tensor([draw.randint(least, size)], dtype=torch.int32)
    softcap = draw.choice([None, None, 20.0])
    return Problem(query, key, value, head_map, draw.uniform(0.05, 0.4), mask, starts, kv_len, softcap)


def solve(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return ``y_h = softmax(scaling * Q_r K_r^T) V_h`` in fp64, head by head, and the queries that see anything."""
    query, key, value = (tensor.double() for tensor in (problem.query, problem.key, problem.value))
    (batch_size, _, q_len, _), size = query.shape, key.shape[2]
    num_heads = problem.assignment.shape[1]
    visible = torch.ones(q_len, size, dtype=torch.bool).tril(size - q_len).expand(batch_size, -1, -1).clone()
    added = torch.zeros(batch_size, q_len, size, dtype=torch.float64)
    if problem.kv_len is not None:
        visible &= torch.arange(size) < problem.kv_len
    if problem.starts is not None:
        visible &= torch.arange(size) >= problem.starts[:, None, None]
    if problem.mask is not None and problem.mask.dtype == torch.bool:
        visible &= problem.mask[:, 0]
    elif problem.mask is not None:
        added += problem.mask[:, 0].double()
    out = torch.empty(batch_size, num_heads, q_len, value.shape[3], dtype=torch.float64)
    for b in range(batch_size):
        for h in range(num_heads):
            c = problem.assignment[b, h]
            scores = problem.scaling * query[b, c] @ key[b, problem.head_map.kv_heads[b, c]].T
            if problem.softcap is not None:
                scores = problem.softcap * torch.tanh(scores / problem.softcap)
            scores = (scores + added[b]).masked_fill(~visible[b], -torch.inf)
            out[b, h] = scores.softmax(-1).nan_to_num() @ value[b, h // (num_heads // value.shape[1])]
    return out, visible.any(2)


def relative_error(result: Tensor, wanted: Tensor, rows: Tensor) -> float:
    """Return the error over all queries that see anything (bool ``[B, T]``), relative to the size of the result."""
    chosen = rows[:, None].expand(wanted.shape[:3])
    return float((result.double() - wanted)[chosen].norm() / wanted[chosen].norm())
