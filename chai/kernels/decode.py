"""Clustered attention of one token: each key head is read once for its cluster, and each value head once.

Decoding is bound by memory, and one sequence has too few clusters to fill a GPU. So the tokens are divided as well
(split-KV, as in FlashDecoding): a program reads one task (:mod:`chai.kernels.tasks`) over a slice of the tokens, with
the scores of one representative and the values of several members side by side. Their parts of the softmax are then
combined. Limit: 2 H / (H + k) of multi-head attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from chai.kernels.compiler import Case, tl, triton
from chai.kernels.scores import ADDITIVE_MASK, BOOL_MASK, HIDDEN, NO_MASK, apply_mask, dot, scale_scores
from chai.kernels.tasks import Tasks

MOST_SPLITS = 64  # slices of the tokens, whose parts one program combines


@dataclass(frozen=True)
class DecodeConfig:
    """Settings of the kernel that change its speed alone."""

    members: int = 2  # value heads of a task
    block: int = 64  # tokens at a time
    waves: int = 2  # programs for each multiprocessor
    num_warps: int = 4
    num_stages: int = 3

    @cached_property
    def label(self) -> str:
        """Short name: members, tokens at a time, waves, warps and stages."""
        return f"{self.members} x {self.block}, {self.waves}/{self.num_warps}/{self.num_stages}"


#: Worth measuring: few members for short contexts (more programs), many for long ones (fewer reads of keys).
CONFIGS = (
    DecodeConfig(),
    DecodeConfig(waves=4),
    DecodeConfig(block=128, num_stages=2),
    DecodeConfig(members=1, block=128),
    DecodeConfig(members=4, block=32, num_stages=4),
    DecodeConfig(members=8, block=32, num_warps=8, num_stages=2),
    DecodeConfig(members=8, block=32, waves=4, num_warps=8, num_stages=2),
)
#: The same for heads wider than 128, whose keys and values need twice the shared memory.
WIDE_CONFIGS = (DecodeConfig(block=32), DecodeConfig(block=32, waves=4), DecodeConfig(members=1, num_stages=2))


def candidates(dim: int) -> tuple[DecodeConfig, ...]:
    """Return settings worth measuring for a head_dim, the default first."""
    return CONFIGS if dim <= 128 else WIDE_CONFIGS


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tasks: Tasks,
    scaling: float,
    *,
    kv_len: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute clustered attention of one token in each row.

    Args:
        query: ``[B, k, 1, D]``, of the representatives.
        key: ``[B, n, S, D]``, of the stored KV heads; the last dimension contiguous, as in ``value``.
        value: ``[B, H_kv, S, D_value]``.
        tasks: The clusters, with ``config.members`` value heads in a task.
        scaling: Factor of the scores.
        kv_len: int32 ``[1]`` on the device: tokens to attend to, if not all ``S``.
        starts: int32 ``[B]`` on the device: the first token of each row that is not padding.
        mask: ``[B or 1, 1, 1, S]``, bool (true: attend) or additive float.
        softcap: Bound of the scores.
        config: Of the kernel.
        out: ``[B, H, 1, D_value]`` to write to.

    Returns:
        ``[B, H, 1, D_value]``.
    """
    batch_size, _, _, head_dim = query.shape
    config = config or candidates(max(head_dim, value.shape[3]))[0]
    assert config.members == tasks.members and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    size, value_dim, num_heads = key.shape[2], value.shape[3], tasks.num_heads
    if out is None:
        out = query.new_empty(batch_size, num_heads, 1, value_dim)
    splits = _count_splits(batch_size * tasks.count, size, config, query.device)
    # Partial outputs, and their log2 sums of powers.
    parts = torch.empty(batch_size, num_heads, splits, value_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch_size, num_heads, splits, dtype=torch.float32, device=query.device)
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
    if mask is not None and kind == BOOL_MASK:
        mask = mask.view(torch.uint8)
    _decode[(splits, batch_size * tasks.count)](
        query,
        key,
        value,
        query if mask is None else mask,
        tasks.table,
        query if kv_len is None else kv_len,
        query if starts is None else starts,
        parts,
        sums,
        scaling,
        0.0 if softcap is None else softcap,
        size,
        splits,
        tasks.count,
        num_heads,
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        *(0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(3)),
        DIM=head_dim,
        DIM_PADDED=triton.next_power_of_2(head_dim),
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=triton.next_power_of_2(value_dim),
        MEMBERS=config.members,
        GROUP=tasks.group,
        BLOCK=config.block,
        STAGES=config.num_stages,
        HAS_LENGTH=kv_len is not None,
        HAS_STARTS=starts is not None,
        MASK=kind,
        CAP=softcap is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=_most_registers(value_dim),
    )
    _combine[(batch_size * num_heads,)](
        parts,
        sums,
        tasks.leaders,
        out,
        splits,
        num_heads,
        *out.stride()[:2],
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=triton.next_power_of_2(value_dim),
        SPLITS_PADDED=triton.next_power_of_2(splits),
        num_warps=4,
    )
    return out


def _count_splits(programs: int, size: int, config: DecodeConfig, device: torch.device) -> int:
    """Return in how many slices to divide the tokens, such that the GPU is full and no slice is empty."""
    wanted = -(-config.waves * _multiprocessors(device) // programs)
    return max(1, min(wanted, -(-size // config.block), MOST_SPLITS))


def _most_registers(value_dim: int) -> int:
    """Return how many registers a thread may have: without this limit the compiler sets a lower one, and spills.

    At this limit, shared memory and not registers limits the programs on a multiprocessor.
    """
    return 168 if value_dim <= 64 else 240


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted: enough for several slices
    return torch.cuda.get_device_properties(device).multi_processor_count


#: Sizes that change from call to call: no kernel is compiled anew for those divisible by 16, or for 1.
VARYING = ["size", "splits", "num_tasks", "num_heads", "stride_mb"]


@triton.jit(do_not_specialize=VARYING)
def _decode(
    query,
    key,
    value,
    mask,
    table,
    length,
    starts,
    parts,
    sums,
    scaling,
    softcap,
    size,
    splits,
    num_tasks,
    num_heads,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_mb,
    stride_ms,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
):
    split = tl.program_id(0)
    row = tl.program_id(1) // num_tasks
    entry = table + tl.program_id(1) * (3 + 2 * MEMBERS)
    count = tl.load(entry + 2)
    if count == 0:
        return
    end, begin = size, 0
    if HAS_LENGTH:
        end = tl.load(length)
    if HAS_STARTS:
        begin = tl.load(starts + row)
    # This program's slice: whole blocks, as many in every slice.
    first = begin // BLOCK * BLOCK
    per_split = tl.cdiv(tl.cdiv(end - first, splits), BLOCK) * BLOCK
    first += split * per_split
    end = tl.minimum(end, first + per_split)
    # The query, as the first of 16 rows.
    dims = tl.arange(0, DIM_PADDED)
    rows = tl.arange(0, 16)
    query += row.to(tl.int64) * stride_qb + tl.load(entry) * stride_qh
    q = tl.load(query + dims[None, :] + rows[:, None] * 0, mask=(rows[:, None] == 0) & (dims[None, :] < DIM), other=0.0)
    # Columns of the values: the members of the task side by side; the first again where there are fewer.
    columns = tl.arange(0, MEMBERS * VALUE_DIM_PADDED)
    slot, value_dims = columns // VALUE_DIM_PADDED, columns % VALUE_DIM_PADDED
    value_heads = tl.load(entry + 3 + tl.where(slot < count, slot, 0))
    offsets = value_heads.to(tl.int64) * stride_vh + value_dims
    offsets = tl.max_contiguous(tl.multiple_of(offsets, 16), VALUE_DIM_PADDED)
    value += row.to(tl.int64) * stride_vb + offsets[None, :]
    key += row.to(tl.int64) * stride_kb + tl.load(entry + 1).to(tl.int64) * stride_kh + dims[:, None]
    mask += row.to(tl.int64) * stride_mb
    most = tl.full([16], HIDDEN, tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, MEMBERS * VALUE_DIM_PADDED], tl.float32)
    for n in tl.range(first, end, BLOCK, num_stages=STAGES):
        tokens = n + tl.arange(0, BLOCK)
        there = tokens < end
        # Scores of the representative.
        k_mask = there[None, :]
        if DIM_PADDED != DIM:
            k_mask = k_mask & (dims[:, None] < DIM)
        k = tl.load(key + tokens[None, :].to(tl.int64) * stride_ks, mask=k_mask, other=0.0)
        scores = scale_scores(dot(q, k, None), scaling, softcap, CAP)
        visible = there
        if HAS_STARTS:
            visible = visible & (tokens >= begin)
        visible = visible[None, :] & (rows[:, None] >= 0)
        scores = apply_mask(scores, mask + tokens[None, :] * stride_ms + rows[:, None] * 0, visible, MASK)
        # Softmax so far.
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_most[:, None])
        shrink = tl.math.exp2(most - new_most)
        total = total * shrink + tl.sum(weights, 1)
        most = new_most
        # Values of the members.
        v_mask = there[:, None]
        if VALUE_DIM_PADDED != VALUE_DIM:
            v_mask = v_mask & (value_dims[None, :] < VALUE_DIM)
        v = tl.load(value + tokens[:, None].to(tl.int64) * stride_vs, mask=v_mask, other=0.0)
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None])
    # Write for the heads that lead: the lowest of the query heads that read each value head.
    acc = acc / tl.maximum(total, 1.0e-30)[:, None]
    real = rows[:, None] == 0
    bits = tl.load(entry + 3 + MEMBERS + slot, mask=slot < count, other=1)
    heads = value_heads * GROUP + _lowest_bit(bits, GROUP)
    place = (row.to(tl.int64) * num_heads + heads) * splits + split
    written = real & (slot < count)[None, :] & (value_dims < VALUE_DIM)[None, :]
    tl.store(parts + place[None, :] * VALUE_DIM + value_dims[None, :] + rows[:, None] * 0, acc, mask=written)
    log_sum = tl.where(total > 0, most + tl.math.log2(tl.maximum(total, 1.0e-30)), HIDDEN)
    members = tl.arange(0, MEMBERS)
    bits = tl.load(entry + 3 + MEMBERS + members, mask=members < count, other=1)
    heads = tl.load(entry + 3 + members, mask=members < count, other=0) * GROUP + _lowest_bit(bits, GROUP)
    place = (row.to(tl.int64) * num_heads + heads) * splits + split
    tl.store(
        sums + place[None, :] + rows[:, None] * 0,
        log_sum[:, None] + members[None, :] * 0.0,
        mask=real & (members < count)[None, :],
    )


@triton.jit
def _lowest_bit(bits, GROUP: tl.constexpr):
    """Return the index of the lowest bit that is set."""
    index = bits * 0
    for i in tl.static_range(GROUP - 1, 0, -1):
        index = tl.where((bits >> i & 1) != 0, i, index)
    return tl.where((bits & 1) != 0, 0, index)


@triton.jit(do_not_specialize=["splits", "num_heads"])
def _combine(
    parts,
    sums,
    leaders,
    out,
    splits,
    num_heads,
    stride_ob,
    stride_oh,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    leader = row * num_heads + tl.load(leaders + tl.program_id(0))
    slices, dims = tl.arange(0, SPLITS_PADDED), tl.arange(0, VALUE_DIM_PADDED)
    log_sums = tl.load(sums + leader * splits + slices, mask=slices < splits, other=-2.0e30)
    shares = tl.math.exp2(log_sums - tl.max(log_sums, 0))
    shares = shares / tl.sum(shares, 0)
    place = (leader.to(tl.int64) * splits + slices)[:, None] * VALUE_DIM + dims[None, :]
    part = tl.load(parts + place, mask=(slices[:, None] < splits) & (dims[None, :] < VALUE_DIM), other=0.0)
    result = tl.sum(part * shares[:, None], 0).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * stride_ob + head * stride_oh + dims, result, mask=dims < VALUE_DIM)


def _compiled(config: DecodeConfig, dim: int, group: int = 1) -> Case:
    integers = [f"stride_{axis}" for axis in "qb qh kb kh ks vb vh vs mb".split()]
    integers += ["size", "splits", "num_tasks", "num_heads"]
    return Case(
        f"decode, head_dim {dim}, {config.members} members, {config.block} tokens, group {group}",
        _decode,
        dict.fromkeys(("query", "key", "value", "mask"), "*bf16")
        | {"table": "*i32", "length": "*i32", "starts": "*i32", "parts": "*fp32", "sums": "*fp32"}
        | {"scaling": "fp32", "softcap": "fp32"}
        | dict.fromkeys(integers, "i32"),
        {
            "DIM": dim,
            "DIM_PADDED": 1 << (dim - 1).bit_length(),
            "VALUE_DIM": dim,
            "VALUE_DIM_PADDED": 1 << (dim - 1).bit_length(),
            "MEMBERS": config.members,
            "GROUP": group,
            "BLOCK": config.block,
            "STAGES": config.num_stages,
            "HAS_LENGTH": True,
            "HAS_STARTS": True,
            "MASK": NO_MASK,
            "CAP": False,
            "stride_ms": 1,
        },
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": _most_registers(dim),
        },
    )


COMPILED = [
    *(_compiled(config, 128) for config in dict.fromkeys(replace(config, waves=1) for config in CONFIGS)),
    *(_compiled(candidates(dim)[0], dim) for dim in (64, 80, 96, 256)),
    _compiled(DecodeConfig(), 128, group=4),
    Case(
        "combine",
        _combine,
        {"parts": "*fp32", "sums": "*fp32", "leaders": "*i32", "out": "*bf16"}
        | dict.fromkeys(("splits", "num_heads", "stride_ob", "stride_oh"), "i32"),
        {"VALUE_DIM": 128, "VALUE_DIM_PADDED": 128, "SPLITS_PADDED": 32},
        {"num_warps": 4},
    ),
]
