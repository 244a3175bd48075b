"""Random shapes of clustered attention, and the equation in fp64."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from chai.attention.gpu import GpuInputs
from chai.heads import HeadClusters, KVHeadMap, repeat_kv, take_heads

#: Errors that are due to chance in small shapes.
LEAST_ERRORS = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Problem:
    """An attention to be computed in more than one way."""

    query: Tensor  # [B, k, T, D]
    key: Tensor  # [B, n, S, D]
    value: Tensor  # [B, H_kv, S, D_value]
    head_map: KVHeadMap
    scaling: float
    mask: Tensor | None
    starts: Tensor | None  # int32 [B]
    kv_len: Tensor | None  # int32 [1]
    softcap: float | None

    def to(self, device: torch.device) -> Problem:
        """Move to a device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, part in moved.items():
            if isinstance(part, (Tensor, KVHeadMap)):
                moved[name] = part.to(device)
        return Problem(**moved)

    @property
    def inputs(self) -> GpuInputs:
        """The same for the implementations on a GPU."""
        tensors = self.query, self.key, self.value, self.scaling
        return GpuInputs(*tensors, self.head_map, self.mask, self.softcap, self.starts, self.kv_len)

    @property
    def assignment(self) -> Tensor:
        """Long ``[B, H]``."""
        return self.head_map.clusters.assignment


def random_problem(seed: int, one_token: bool, kinds: int | None = None) -> Problem:
    """Draw rows, heads, clusters, grouped queries, head sizes, types, lengths, padding and masks.

    With ``kinds``, everything that a kernel is compiled for depends on ``seed % kinds`` alone: fewer compilations.
    """
    draw, kind_draw = random.Random(seed), random.Random(f"kind {seed if kinds is None else seed % kinds}")
    torch.manual_seed(seed)
    num_heads = kind_draw.choice([1, 2, 3, 4, 6])
    group = kind_draw.choice([size for size in (1, 2, 3) if num_heads % size == 0])
    batch_size, k, stored = draw.choice([1, 1, 2]), draw.randint(1, num_heads), draw.randint(1, 3)
    dim = kind_draw.choice([16, 32, 64, 80, 96, 128])
    value_dim = kind_draw.choice([dim, dim, dim, 32])
    dtype = kind_draw.choice([torch.float16, torch.bfloat16, torch.float32])
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
    kind = kind_draw.choice(["none", "none", "starts", "bool", "additive"])
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
    if one_token and mask is None and kind_draw.random() < 0.5:
        least = 1 if starts is None else int(starts.max()) + 1
        kv_len = torch.tensor([draw.randint(least, size)], dtype=torch.int32)
    softcap = kind_draw.choice([None, None, 20.0])
    return Problem(query, key, value, head_map, draw.uniform(0.05, 0.4), mask, starts, kv_len, softcap)


def large_problem(
    device: torch.device, k: int, q_len: int, size: int, *, padded: bool = False, num_heads: int = 32
) -> Problem:
    """Draw a problem of LLaMA-7B's heads in bf16, with clusters of different sizes, for the settings that are used."""
    generator = torch.Generator(device).manual_seed(k + size)

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(2, heads, tokens, 128, device=device, generator=generator).to(torch.bfloat16)

    labels = torch.randint(k, (2, num_heads), device=device, generator=generator)
    labels[:, :k] = torch.arange(k, device=device)
    heads = torch.arange(k, device=device).expand(2, -1)
    starts = torch.tensor([0, size - q_len // 2 - 1], dtype=torch.int32, device=device) if padded else None
    head_map = KVHeadMap(HeadClusters(labels, heads), heads, heads)
    return Problem(draw(k, q_len), draw(k, size), draw(num_heads, size), head_map, 128**-0.5, None, starts, None, None)


def solve(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return ``y_h = softmax(scaling * Q_r K_r^T) V_h`` in fp64, head by head, and the queries that see anything."""
    query, key, value = (tensor.double() for tensor in (problem.query, problem.key, problem.value))
    (batch_size, _, q_len, _), size = query.shape, key.shape[2]
    num_heads = problem.assignment.shape[1]
    device = query.device
    visible = torch.ones(batch_size, q_len, size, dtype=torch.bool, device=device).tril(size - q_len)
    added = torch.zeros(batch_size, q_len, size, dtype=torch.float64, device=device)
    places = torch.arange(size, device=device)
    if problem.kv_len is not None:
        visible &= places < problem.kv_len
    if problem.starts is not None:
        visible &= places >= problem.starts[:, None, None]
    if problem.mask is not None and problem.mask.dtype == torch.bool:
        visible &= problem.mask[:, 0]
    elif problem.mask is not None:
        added += problem.mask[:, 0].double()
    out = value.new_empty(batch_size, num_heads, q_len, value.shape[3])
    labels, kv_heads = problem.assignment.tolist(), problem.head_map.kv_heads.tolist()
    for b in range(batch_size):
        for h, c in enumerate(labels[b]):
            scores = problem.scaling * query[b, c] @ key[b, kv_heads[b][c]].T
            if problem.softcap is not None:
                scores = problem.softcap * torch.tanh(scores / problem.softcap)
            scores = (scores + added[b]).masked_fill(~visible[b], -torch.inf)
            out[b, h] = scores.softmax(-1).nan_to_num() @ value[b, h // (num_heads // value.shape[1])]
    return out, visible.any(2)


def relative_error(result: Tensor, wanted: Tensor, rows: Tensor) -> float:
    """Return the error over all queries that see anything (bool ``[B, T]``), relative to the size of the result."""
    chosen = rows[:, None].expand(wanted.shape[:3])
    return float((result.double() - wanted)[chosen].norm() / wanted[chosen].norm())


def stock_error(problem: Problem, wanted: Tensor, rows: Tensor) -> float:
    """Return the error of torch's attention with repeated queries and keys; of plain products with a soft cap."""
    assignment = problem.assignment
    query = take_heads(problem.query, assignment)
    key = take_heads(problem.key, problem.head_map.kv_heads.gather(1, assignment))
    value = repeat_kv(problem.value, assignment.shape[1])
    (_, _, q_len, _), size = query.shape, key.shape[2]
    visible = torch.ones(q_len, size, dtype=torch.bool, device=key.device).tril(size - q_len)[None, None]
    places = torch.arange(size, device=key.device)
    if problem.kv_len is not None:
        visible = visible & (places < problem.kv_len)
    if problem.starts is not None:
        visible = visible & (places >= problem.starts[:, None, None, None])
    added = torch.zeros(visible.shape, device=key.device)
    if problem.mask is not None and problem.mask.dtype == torch.bool:
        visible = visible & problem.mask
    elif problem.mask is not None:
        added = problem.mask.float()
    least = torch.finfo(query.dtype).min
    added = added.masked_fill(~visible, least).clamp(min=least)
    if problem.softcap is None:
        mask = added.to(query.dtype)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=problem.scaling)
    else:
        scores = problem.scaling * (query @ key.transpose(2, 3)).float()
        weights = (problem.softcap * torch.tanh(scores / problem.softcap) + added).softmax(-1)
        out = weights.to(value.dtype) @ value
    return relative_error(out, wanted, rows)


def is_exact(problem: Problem, result: Tensor) -> bool:
    """Whether a result is finite, and as exact as stock attention."""
    wanted, rows = solve(problem)
    limit = max(LEAST_ERRORS[result.dtype], 1.5 * stock_error(problem, wanted, rows))
    return bool(result.isfinite().all()) and relative_error(result, wanted, rows) < limit
