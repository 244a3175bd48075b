"""Triton kernels of a decoder layer apart from its attention: normalisation, rotary embedding, cache, activation.

Each computes in one launch what the plain function of the same name in :mod:`chai.engine.plain` computes, and rounds to
the dtype of the model where transformers' modules do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chai.kernels.compiler import Case, tl, triton

#: Tokens of one head that a program rotates or stores, at most.
TOKENS = 16
#: Neurons that a program activates.
NEURONS = 1024


@triton.jit
def rms_norm_kernel(x, y, weight, total, out, width, eps, ADD: tl.constexpr, WIDTH: tl.constexpr):
    """One program: a token's ``x + y`` and its norm; ``x``, ``y``, ``total`` and ``out`` are ``[tokens, width]``."""
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    hidden = tl.load(x + row + columns, mask=inside, other=0.0)
    if ADD:
        added = tl.load(y + row + columns, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row + columns, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normal = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row + columns, (factors * normal).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_len", "skip", "num_queries", "num_keys", "num_values"])
def rotate_and_store_kernel(
    query,
    key,
    value,
    query_out,
    keys,
    values,
    cos,
    sin,
    position,
    starts,
    query_heads,
    key_heads,
    value_heads,
    query_norm,
    key_norm,
    q_len,
    num_queries,
    num_keys,
    num_values,
    eps,
    skip,
    query_b,
    query_t,
    query_h,
    key_b,
    key_t,
    key_h,
    value_b,
    value_t,
    value_h,
    keys_b,
    keys_h,
    values_b,
    values_h,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    PICK_QUERY: tl.constexpr,
    PICK_KEY: tl.constexpr,
    PICK_VALUE: tl.constexpr,
    NORM: tl.constexpr,
):
    """One program: some tokens of one head of one row, which is rotated (query, key) and put where it is read."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    token = tl.program_id(0) * TOKENS_BLOCK + tl.arange(0, TOKENS_BLOCK)
    half = tl.arange(0, HALF_BLOCK)
    new = token < q_len
    inside = new[:, None] & (half < HALF)[None, :]
    # Places in the cache, and positions among the real tokens.
    place = tl.load(position) + token
    turn = place
    stored = new
    if PADDED:
        start = tl.load(starts + row)
        turn = tl.maximum(place - start, 0)
        stored = new & ((place < start) | (place >= start + skip))
    else:
        stored = new & (place >= skip)
    cell = inside & stored[:, None]
    if head >= num_queries + num_keys:
        own = (head - num_queries - num_keys).to(tl.int64)
        source = own
        if PICK_VALUE:
            source = tl.load(value_heads + row * num_values + own)
        begin = value + row * value_b + source * value_h + token.to(tl.int64)[:, None] * value_t + half[None, :]
        first = tl.load(begin, mask=cell, other=0.0)
        second = tl.load(begin + HALF, mask=cell, other=0.0)
        end = values + row * values_b + own * values_h + place.to(tl.int64)[:, None] * (2 * HALF) + half[None, :]
        tl.store(end, first, mask=cell)
        tl.store(end + HALF, second, mask=cell)
    else:
        is_query = head < num_queries
        own = tl.where(is_query, head, head - num_queries).to(tl.int64)
        source = own
        if is_query:
            if PICK_QUERY:
                source = tl.load(query_heads + row * num_queries + own)
            begin = query + row * query_b + source * query_h + token.to(tl.int64)[:, None] * query_t + half[None, :]
            norm = query_norm
        else:
            if PICK_KEY:
                source = tl.load(key_heads + row * num_keys + own)
            begin = key + row * key_b + source * key_h + token.to(tl.int64)[:, None] * key_t + half[None, :]
            norm = key_norm
        first = tl.load(begin, mask=inside, other=0.0)
        second = tl.load(begin + HALF, mask=inside, other=0.0)
        kind = first.dtype
        if NORM:
            wide, wide_second = first.to(tl.float32), second.to(tl.float32)
            squares = tl.sum(wide * wide + wide_second * wide_second, 1)
            scale = (1.0 / tl.sqrt(squares / (2 * HALF) + eps))[:, None]
            factors = tl.load(norm + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
            factors_second = tl.load(norm + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
            first = (factors * (wide * scale).to(kind).to(tl.float32)).to(kind)
            second = (factors_second * (wide_second * scale).to(kind).to(tl.float32)).to(kind)
        angles = turn.to(tl.int64)[:, None] * HALF + half[None, :]
        c = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
        wide, wide_second = first.to(tl.float32), second.to(tl.float32)
        first = ((wide * c).to(kind).to(tl.float32) - (wide_second * s).to(kind).to(tl.float32)).to(kind)
        second = ((wide_second * c).to(kind).to(tl.float32) + (wide * s).to(kind).to(tl.float32)).to(kind)
        if is_query:
            end = (
                query_out
                + ((row * q_len + token.to(tl.int64)[:, None]) * num_queries + own) * (2 * HALF)
                + half[None, :]
            )
            tl.store(end, first, mask=inside)
            tl.store(end + HALF, second, mask=inside)
        else:
            end = keys + row * keys_b + own * keys_h + place.to(tl.int64)[:, None] * (2 * HALF) + half[None, :]
            tl.store(end, first, mask=cell)
            tl.store(end + HALF, second, mask=cell)


@triton.jit(
    do_not_specialize=["tokens", "capacity", "num_keys", "num_values", "key_source_heads", "value_source_heads"]
)
def store_tokens_kernel(
    key,
    value,
    keys,
    values,
    starts,
    key_heads,
    value_heads,
    tokens,
    num_keys,
    num_values,
    key_source_heads,
    value_source_heads,
    capacity,
    keys_b,
    keys_h,
    values_b,
    values_h,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    PICK_KEY: tl.constexpr,
    PICK_VALUE: tl.constexpr,
):
    """One program: some warm-up tokens of one stored KV head of one row, copied into the cache from its start on."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    token, column = tl.program_id(2) * TOKENS_BLOCK + tl.arange(0, TOKENS_BLOCK), tl.arange(0, SIZE_BLOCK)
    place = tl.load(starts + row) + token
    inside = ((token < tokens) & (place < capacity))[:, None] & (column < SIZE)[None, :]
    offset = token.to(tl.int64)[:, None] * SIZE + column[None, :]
    target = place.to(tl.int64)[:, None] * SIZE + column[None, :]
    if head < num_keys:
        own = head.to(tl.int64)
        source = own
        if PICK_KEY:
            source = tl.load(key_heads + row * num_keys + own)
        found = tl.load(key + (row * key_source_heads + source) * tokens * SIZE + offset, mask=inside, other=0.0)
        tl.store(keys + row * keys_b + own * keys_h + target, found, mask=inside)
    else:
        own = (head - num_keys).to(tl.int64)
        source = own
        if PICK_VALUE:
            source = tl.load(value_heads + row * num_values + own)
        found = tl.load(value + (row * value_source_heads + source) * tokens * SIZE + offset, mask=inside, other=0.0)
        tl.store(values + row * values_b + own * values_h + target, found, mask=inside)


@triton.jit
def gated_activation_kernel(product, out, neurons, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: some neurons of one token; ``product`` is ``[tokens, 2 * neurons]``: gate, then up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < neurons
    raw = tl.load(product + row * 2 * neurons + column, mask=inside, other=0.0)
    up = tl.load(product + row * 2 * neurons + neurons + column, mask=inside, other=0.0).to(tl.float32)
    gate = raw.to(tl.float32)
    if TANH:  # 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        active = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        active = gate / (1.0 + tl.exp(-gate))
    active = active.to(raw.dtype).to(tl.float32)
    tl.store(out + row * neurons + column, (active * up).to(raw.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`chai.engine.plain.rms_norm`."""
    width = x.shape[-1]
    x = x.contiguous()
    out, total = torch.empty_like(x), x if y is None else torch.empty_like(x)
    block = _power_of_2(width)
    rms_norm_kernel[(x.numel() // width,)](
        x,
        x if y is None else y.contiguous(),
        weight,
        total,
        out,
        width,
        eps,
        ADD=y is not None,
        WIDTH=block,
        num_warps=_norm_warps(block),
    )
    return total, out


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    starts: Tensor | None = None,
    *,
    query_heads: Tensor | None = None,
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    skip: int = 0,
) -> Tensor:
    """See :func:`chai.engine.plain.rotate_and_store`.

    The queries lie in memory as ``[B, T, k, D]``, as the product with W_O reads the outputs: fused kernels of attention
    that lay out their output as their queries need no copy.
    """
    rows, q_len, _, size = query.shape
    num_queries = query.shape[2] if query_heads is None else query_heads.shape[1]
    num_keys, num_values = keys.shape[1], values.shape[1]
    out = query.new_empty(rows, q_len, num_queries, size)
    block = 1 if q_len == 1 else TOKENS
    half = size // 2
    rotate_and_store_kernel[(triton.cdiv(q_len, block), num_queries + num_keys + num_values, rows)](
        query,
        key,
        value,
        out,
        keys,
        values,
        cos,
        sin,
        position,
        position if starts is None else starts,
        position if query_heads is None else query_heads,
        position if key_heads is None else key_heads,
        position if value_heads is None else value_heads,
        cos if query_norm is None else query_norm,
        cos if key_norm is None else key_norm,
        q_len,
        num_queries,
        num_keys,
        num_values,
        eps,
        skip,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *keys.stride()[:2],
        *values.stride()[:2],
        HALF=half,
        HALF_BLOCK=_power_of_2(half),
        TOKENS_BLOCK=block,
        PADDED=starts is not None,
        PICK_QUERY=query_heads is not None,
        PICK_KEY=key_heads is not None,
        PICK_VALUE=value_heads is not None,
        NORM=query_norm is not None,
        num_warps=1 if block == 1 else 4,
    )
    return out.transpose(1, 2)


def store_tokens(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
) -> None:
    """See :func:`chai.engine.plain.store_tokens`."""
    rows, _, tokens, size = key.shape
    num_keys, num_values = keys.shape[1], values.shape[1]
    block = min(TOKENS, _power_of_2(tokens))
    store_tokens_kernel[(num_keys + num_values, rows, triton.cdiv(tokens, block))](
        key,
        value,
        keys,
        values,
        starts,
        starts if key_heads is None else key_heads,
        starts if value_heads is None else value_heads,
        tokens,
        num_keys,
        num_values,
        key.shape[1],
        value.shape[1],
        keys.shape[2],
        *keys.stride()[:2],
        *values.stride()[:2],
        SIZE=size,
        SIZE_BLOCK=_power_of_2(size),
        TOKENS_BLOCK=block,
        PICK_KEY=key_heads is not None,
        PICK_VALUE=value_heads is not None,
        num_warps=4,
    )


def gated_activation(product: Tensor, kind: str) -> Tensor:
    """See :func:`chai.engine.plain.gated_activation`."""
    neurons = product.shape[-1] // 2
    out = product.new_empty(*product.shape[:-1], neurons)
    grid = (product.numel() // (2 * neurons), triton.cdiv(neurons, NEURONS))
    gated_activation_kernel[grid](product, out, neurons, TANH=kind == "gelu_tanh", BLOCK=NEURONS, num_warps=4)
    return out


def _power_of_2(number: int) -> int:
    """Return the least power of two that is no less."""
    return 1 << (number - 1).bit_length()


def _norm_warps(block: int) -> int:
    return max(1, min(8, block // 512))


def _rotate_case(size: int, q_len: int, chosen: bool, kind: str) -> Case:
    """Return the case of heads of a size; with ``chosen``, the heads are picked, normalised, and padded rows."""
    states = ("query", "key", "value", "query_out", "keys", "values", "cos", "sin", "query_norm", "key_norm")
    numbers = ["q_len", "num_queries", "num_keys", "num_values", "skip"]
    numbers += [f"{name}_{axis}" for name in ("query", "key", "value") for axis in "bth"]
    numbers += [f"{name}_{axis}" for name in ("keys", "values") for axis in "bh"]
    types = dict.fromkeys(states, f"*{kind}") | dict.fromkeys(numbers, "i32") | {"eps": "fp32"}
    types |= {"position": "*i32", "starts": "*i32"}
    types |= dict.fromkeys(("query_heads", "key_heads", "value_heads"), "*i64")
    block = 1 if q_len == 1 else TOKENS
    constants = {"HALF": size // 2, "HALF_BLOCK": _power_of_2(size // 2), "TOKENS_BLOCK": block}
    constants |= dict.fromkeys(("PADDED", "PICK_QUERY", "PICK_KEY", "PICK_VALUE", "NORM"), chosen)
    name = f"rotate and store, {kind}, head size {size}, {q_len} tokens" + ", chosen" * chosen
    return Case(name, rotate_and_store_kernel, types, constants, {"num_warps": 1 if block == 1 else 4})


def _store_case(size: int) -> Case:
    numbers = ("tokens", "num_keys", "num_values", "key_source_heads", "value_source_heads", "capacity")
    types = dict.fromkeys(("key", "value", "keys", "values"), "*bf16")
    types |= {"starts": "*i32", "key_heads": "*i64", "value_heads": "*i64"}
    types |= dict.fromkeys((*numbers, "keys_b", "keys_h", "values_b", "values_h"), "i32")
    constants = {"SIZE": size, "SIZE_BLOCK": _power_of_2(size), "TOKENS_BLOCK": 8, "PICK_KEY": True, "PICK_VALUE": True}
    return Case(f"store warm-up tokens, head size {size}", store_tokens_kernel, types, constants, {"num_warps": 4})


def _norm_case(width: int) -> Case:
    types = {**dict.fromkeys(("x", "y", "weight", "total", "out"), "*bf16"), "width": "i32", "eps": "fp32"}
    constants, options = {"ADD": True, "WIDTH": width}, {"num_warps": _norm_warps(width)}
    return Case(f"RMS norm, width {width}", rms_norm_kernel, types, constants, options)


def _gate_case(tanh: bool) -> Case:
    types, constants = {"product": "*bf16", "out": "*bf16", "neurons": "i32"}, {"TANH": tanh, "BLOCK": NEURONS}
    name = f"gated activation, {'gelu' if tanh else 'silu'}"
    return Case(name, gated_activation_kernel, types, constants, {"num_warps": 4})


COMPILED = [
    *(_norm_case(width) for width in (4096, 8192)),
    *(_rotate_case(size, q_len, True, "bf16") for size in (80, 128) for q_len in (1, TOKENS)),
    *(_rotate_case(128, TOKENS, False, kind) for kind in ("fp16", "fp32")),
    *(_store_case(size) for size in (80, 128)),
    *(_gate_case(tanh) for tanh in (False, True)),
]
