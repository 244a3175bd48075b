"""Clustered attention of a prompt: the scores of a representative are computed once for two members.

As in FlashAttention, no score is written to memory: a program holds a block of queries of one task
(:mod:`chai.kernels.tasks`) and passes over the keys. The product of queries and keys, the softmax, and the loads of
keys serve both members; only the products with the values are per member. Two members fill the registers of a
multiprocessor, so a larger cluster is several tasks, and the limit is 4/3 of multi-head attention, not 2 H / (H + k).

Programs of the last queries, which have the most keys, start first, and those of the same queries lie side by side.
Keys and values are loaded by tensor descriptors (TMA where the GPU has it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chai.kernels.compiler import Case, tl, triton
from chai.kernels.scores import ADDITIVE_MASK, BOOL_MASK, HIDDEN, NO_MASK, apply_mask, dot, scale_scores
from chai.kernels.tasks import Tasks

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # without Triton
    TensorDescriptor = None


@dataclass(frozen=True)
class PrefillConfig:
    """Settings of the kernel that change its speed alone."""

    members: int = 2  # value heads of a task: 1 or 2
    queries: int = 128  # of a program
    keys: int = 64  # at a time
    num_warps: int = 8
    num_stages: int = 3

    @cached_property
    def label(self) -> str:
        """Short name: members, queries and keys at a time, warps and stages."""
        return f"{self.members} x {self.queries} x {self.keys}, {self.num_warps}/{self.num_stages}"


def default_config(dim: int, tma: bool, masked: bool) -> PrefillConfig:
    """Return settings that spill no registers, for a head_dim, with tensor descriptors or without, and with a mask."""
    if dim > 128:
        return PrefillConfig(members=2 if tma else 1, queries=64, keys=32, num_stages=2)
    if masked or not tma:
        return PrefillConfig(members=1 if masked and not tma else 2, queries=64, keys=32, num_stages=2)
    return PrefillConfig()


def candidates(dim: int, tma: bool, masked: bool) -> list[PrefillConfig]:
    """Return settings worth measuring, the default first."""
    configs = [default_config(dim, tma, masked)]
    if dim > 128 or masked:
        return configs
    if not tma:
        return [*configs, PrefillConfig(members=1, keys=32, num_stages=2)]
    configs += [PrefillConfig(num_stages=2), PrefillConfig(queries=64, num_warps=4, num_stages=2)]
    return [*configs, PrefillConfig(queries=64, num_warps=4), PrefillConfig(members=1, keys=128, num_stages=2)]


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tasks: Tasks,
    scaling: float,
    *,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    config: PrefillConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute clustered attention of a prompt, or of its last ``T`` tokens.

    Args:
        query: ``[B, k, T, D]``, of the representatives; the last dimension contiguous, as in ``key`` and ``value``.
        key: ``[B, n, S, D]``, of the stored KV heads.
        value: ``[B, H_kv, S, D_value]``.
        tasks: The clusters, with ``config.members`` value heads in a task.
        scaling: Factor of the scores.
        starts: int32 ``[B]`` on the device: the first token of each row that is not padding.
        mask: ``[B or 1, 1, T, S]``, bool (true: attend) or additive float; later tokens are hidden in any case.
        softcap: Bound of the scores.
        config: Of the kernel.
        out: ``[B, H, T, D_value]`` to write to.

    Returns:
        ``[B, H, T, D_value]``, a view of ``[B, T, H, D_value]``. Queries that see nothing: finite numbers.
    """
    tma = has_descriptors(query, key, value)
    config = config or default_config(max(query.shape[3], value.shape[3]), tma, mask is not None)
    assert config.members == tasks.members
    batch_size, _, q_len, head_dim = query.shape
    kv_len, value_dim, num_heads = key.shape[2], value.shape[3], tasks.num_heads
    if out is None:
        out = query.new_empty(batch_size, q_len, num_heads, value_dim).transpose(1, 2)
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
    if mask is not None and kind == BOOL_MASK:
        mask = mask.view(torch.uint8)
    dim_padded, value_dim_padded = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    _prefill[(batch_size * tasks.count, triton.cdiv(q_len, config.queries))](
        _describe(query, config.queries, dim_padded) if tma else query,
        _describe(key, config.keys, dim_padded) if tma else key,
        _describe(value, config.keys, value_dim_padded) if tma else value,
        out,
        tasks.table,
        query if starts is None else starts,
        query if mask is None else mask,
        scaling,
        0.0 if softcap is None else softcap,
        q_len,
        kv_len,
        tasks.count,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out.stride()[:3],
        *(0, 0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, *mask.stride()[2:]),
        DIM=head_dim,
        DIM_PADDED=dim_padded,
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=value_dim_padded,
        MEMBERS=config.members,
        GROUP=tasks.group,
        QUERIES=config.queries,
        KEYS=config.keys,
        STAGES=config.num_stages,
        HAS_STARTS=starts is not None,
        MASK=kind,
        CAP=softcap is not None,
        TMA=tma,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def has_descriptors(*tensors: Tensor) -> bool:
    """Whether the tensors can be loaded by descriptors: the GPU has TMA, and rows begin at multiples of 16 bytes."""
    device = tensors[0].device
    if TensorDescriptor is None or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)):
        return False
    return all(
        tensor.data_ptr() % 16 == 0 and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )


def _describe(tensor: Tensor, tokens: int, dim: int) -> object:
    """Return the descriptor of ``[B, N, S, D]`` that loads ``[tokens, dim]`` of a head; zeros beyond its end."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, tokens, dim])


@triton.jit(do_not_specialize=["q_len", "kv_len", "num_tasks", "stride_mb", "stride_mt"])
def _prefill(
    query,
    key,
    value,
    out,
    table,
    starts,
    mask,
    scaling,
    softcap,
    q_len,
    kv_len,
    num_tasks,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_mb,
    stride_mt,
    stride_ms,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    TMA: tl.constexpr,
):
    row = tl.program_id(0) // num_tasks
    entry = table + tl.program_id(0) * (3 + 2 * MEMBERS)
    count = tl.load(entry + 2)
    if count == 0:
        return
    # Two copies of the same code: a condition around each product with values would keep them from being pipelined.
    if (MEMBERS == 1) or (count == 1):
        _task(
            query, key, value, out, entry, starts, mask, row, scaling, softcap, q_len, kv_len, stride_qb,
            stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
            stride_ob, stride_oh, stride_ot, stride_mb, stride_mt, stride_ms, DIM, DIM_PADDED, VALUE_DIM,
            VALUE_DIM_PADDED, MEMBERS, GROUP, QUERIES, KEYS, STAGES, HAS_STARTS, MASK, CAP, TMA, False,
        )  # fmt: skip
    else:
        _task(
            query, key, value, out, entry, starts, mask, row, scaling, softcap, q_len, kv_len, stride_qb,
            stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
            stride_ob, stride_oh, stride_ot, stride_mb, stride_mt, stride_ms, DIM, DIM_PADDED, VALUE_DIM,
            VALUE_DIM_PADDED, MEMBERS, GROUP, QUERIES, KEYS, STAGES, HAS_STARTS, MASK, CAP, TMA, True,
        )  # fmt: skip


@triton.jit
def _task(
    query,
    key,
    value,
    out,
    entry,
    starts,
    mask,
    row,
    scaling,
    softcap,
    q_len,
    kv_len,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_mb,
    stride_mt,
    stride_ms,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    TMA: tl.constexpr,
    TWO: tl.constexpr,  # two members
):
    """Compute the outputs of one or two members for the queries of this program."""
    # The queries of this program: the last ones, which have the most keys, come first.
    first_query = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    q = _load(
        query,
        row,
        tl.load(entry),
        first_query,
        q_len,
        stride_qb,
        stride_qh,
        stride_qt,
        QUERIES,
        DIM,
        DIM_PADDED,
        True,
        TMA,
    )
    queries = (first_query + tl.arange(0, QUERIES))[:, None]
    mask += row.to(tl.int64) * stride_mb + queries.to(tl.int64) * stride_mt
    out += row.to(tl.int64) * stride_ob
    # Keys before `full` are seen by all queries, those from `end` on by none.
    before = kv_len - q_len
    begin, start = 0, 0
    if HAS_STARTS:
        start = tl.load(starts + row)
        begin = start // KEYS * KEYS
    full = tl.maximum((before + first_query) // KEYS * KEYS, begin)
    end = tl.minimum(kv_len, before + first_query + QUERIES)
    kv_head, first_head, first_bits = tl.load(entry + 1), tl.load(entry + 3), tl.load(entry + 3 + MEMBERS)
    most = tl.full([QUERIES], HIDDEN, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    first_acc = tl.zeros([QUERIES, VALUE_DIM_PADDED], tl.float32)
    second_head, second_bits, second_acc = first_head, first_bits, first_acc
    if TWO:
        second_head, second_bits = tl.load(entry + 4), tl.load(entry + 4 + MEMBERS)
    most, total, first_acc, second_acc = _pass(
        q, key, value, mask, row, kv_head, first_head, second_head, queries, begin, full, most, total,
        first_acc, second_acc, scaling, softcap, start, before, q_len, kv_len, stride_kb, stride_kh,
        stride_ks, stride_vb, stride_vh, stride_vs, stride_ms, DIM, DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
        KEYS, STAGES, HAS_STARTS, MASK, CAP, TMA, False, TWO,
    )  # fmt: skip
    most, total, first_acc, second_acc = _pass(
        q, key, value, mask, row, kv_head, first_head, second_head, queries, full, end, most, total,
        first_acc, second_acc, scaling, softcap, start, before, q_len, kv_len, stride_kb, stride_kh,
        stride_ks, stride_vb, stride_vh, stride_vs, stride_ms, DIM, DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED,
        KEYS, STAGES, HAS_STARTS, MASK, CAP, TMA, True, TWO,
    )  # fmt: skip
    _write(
        out, first_acc, total, first_head, first_bits, queries, q_len, stride_oh, stride_ot, VALUE_DIM,
        VALUE_DIM_PADDED, GROUP,
    )  # fmt: skip
    if TWO:
        _write(
            out, second_acc, total, second_head, second_bits, queries, q_len, stride_oh, stride_ot, VALUE_DIM,
            VALUE_DIM_PADDED, GROUP,
        )  # fmt: skip


@triton.jit
def _pass(
    q,
    key,
    value,
    mask,
    row,
    kv_head,
    first_head,
    second_head,
    queries,
    begin,
    end,
    most,
    total,
    first_acc,
    second_acc,
    scaling,
    softcap,
    start,
    before,
    q_len,
    kv_len,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ms,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    TMA: tl.constexpr,
    DIAGONAL: tl.constexpr,  # some queries do not see some of these keys
    TWO: tl.constexpr,  # two members
):
    """Pass over the keys from ``begin`` to ``end``, and add their part to the softmax and the outputs."""
    for n in tl.range(begin, end, KEYS, num_stages=1 if DIAGONAL and not TMA else STAGES):
        k = _load(key, row, kv_head, n, kv_len, stride_kb, stride_kh, stride_ks, KEYS, DIM, DIM_PADDED, DIAGONAL, TMA)
        scores = scale_scores(dot(q, k.T, None), scaling, softcap, CAP)
        tokens = n + tl.arange(0, KEYS)[None, :]
        if DIAGONAL:
            visible = (tokens <= before + queries) & (tokens >= start) & (queries < q_len)
            scores = apply_mask(scores, mask + tokens * stride_ms, visible, MASK)
        elif HAS_STARTS or MASK:
            scores = apply_mask(scores, mask + tokens * stride_ms, (tokens >= start) & (queries < q_len), MASK)
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_most[:, None])
        shrink = tl.math.exp2(most - new_most)
        total = total * shrink + tl.sum(weights, 1)
        most = new_most
        v = _load(
            value,
            row,
            first_head,
            n,
            kv_len,
            stride_vb,
            stride_vh,
            stride_vs,
            KEYS,
            VALUE_DIM,
            VALUE_DIM_PADDED,
            DIAGONAL,
            TMA,
        )
        weights = weights.to(v.dtype)
        first_acc = dot(weights, v, first_acc * shrink[:, None])
        if TWO:
            v = _load(
                value,
                row,
                second_head,
                n,
                kv_len,
                stride_vb,
                stride_vh,
                stride_vs,
                KEYS,
                VALUE_DIM,
                VALUE_DIM_PADDED,
                DIAGONAL,
                TMA,
            )
            second_acc = dot(weights, v, second_acc * shrink[:, None])
    return most, total, first_acc, second_acc


@triton.jit
def _load(
    source,
    row,
    head,
    first,
    tokens,
    stride_b,
    stride_h,
    stride_t,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    CHECK: tl.constexpr,  # some tokens may lie beyond the end: zeros
    TMA: tl.constexpr,
):
    """Load ``[TOKENS, DIM_PADDED]`` of one head from token ``first`` on."""
    if TMA:
        return source.load([row, head, first, 0]).reshape(TOKENS, DIM_PADDED)
    else:
        source += row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tl.cast(first, tl.int64) * stride_t
        index, dims = tl.arange(0, TOKENS)[:, None], tl.arange(0, DIM_PADDED)[None, :]
        pointers = source + index * stride_t + dims
        if CHECK and DIM == DIM_PADDED:
            return tl.load(pointers, mask=first + index < tokens, other=0.0)
        elif CHECK:
            return tl.load(pointers, mask=(first + index < tokens) & (dims < DIM), other=0.0)
        elif DIM == DIM_PADDED:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=dims < DIM, other=0.0)


@triton.jit
def _write(
    out,
    acc,
    total,
    value_head,
    bits,
    queries,
    q_len,
    stride_oh,
    stride_ot,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store one output for all query heads of the group of a value head that take it (bits)."""
    result = (acc * (1.0 / tl.maximum(total, 1.0e-30))[:, None]).to(out.dtype.element_ty)
    dims = tl.arange(0, VALUE_DIM_PADDED)[None, :]
    written = (queries < q_len) & (dims < VALUE_DIM)
    for i in tl.static_range(GROUP):
        if GROUP == 1 or (bits >> i) & 1 != 0:
            head = out + (value_head * GROUP + i).to(tl.int64) * stride_oh
            tl.store(head + queries.to(tl.int64) * stride_ot + dims, result, mask=written)


def _compiled(
    config: PrefillConfig, dim: int, tma: bool, mask: int = NO_MASK, group: int = 1, padded_rows: bool = False
) -> Case:
    padded = 1 << (dim - 1).bit_length()
    query, keys = (
        f"tensordesc<bf16[1, 1, {tokens}, {padded}]>" if tma else "*bf16" for tokens in (config.queries, config.keys)
    )
    integers = ["q_len", "kv_len", "num_tasks", "stride_mb", "stride_mt"]
    integers += [f"stride_{axis}" for axis in "qb qh qt kb kh ks vb vh vs ob oh ot".split()]
    return Case(
        f"prefill, head_dim {dim}, {config.members} members, {config.queries} x {config.keys}"
        + f", {('no mask', 'bool mask', 'additive mask')[mask]}, group {group}, {'TMA' if tma else 'pointers'}"
        + (", padding" if padded_rows else ""),
        _prefill,
        {"query": query, "key": keys, "value": keys, "out": "*bf16", "table": "*i32", "starts": "*i32"}
        | {"mask": "*u8" if mask == BOOL_MASK else "*bf16", "scaling": "fp32", "softcap": "fp32"}
        | dict.fromkeys(integers, "i32"),
        {
            "DIM": dim,
            "DIM_PADDED": padded,
            "VALUE_DIM": dim,
            "VALUE_DIM_PADDED": padded,
            "MEMBERS": config.members,
            "GROUP": group,
            "QUERIES": config.queries,
            "KEYS": config.keys,
            "STAGES": config.num_stages,
            "HAS_STARTS": padded_rows,
            "MASK": mask,
            "CAP": False,
            "TMA": tma,
            "stride_ms": 1,
        },
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        architectures=(90,) if tma else (80,),
    )


COMPILED = [
    _compiled(default_config(128, True, False), 128, True, padded_rows=True),
    *(_compiled(config, 128, True) for config in candidates(128, True, False)),
    *(_compiled(config, 128, False) for config in candidates(128, False, False)),
    *(
        _compiled(default_config(dim, tma, mask != NO_MASK), dim, tma, mask, group)
        for tma in (False, True)
        for dim, mask, group in ((64, 0, 1), (80, 0, 1), (96, 0, 1), (256, 0, 1), (128, 1, 1), (128, 2, 1), (128, 0, 4))
    ),
]
