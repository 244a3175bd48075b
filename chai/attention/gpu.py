"""Attention on a GPU: the implementations that compete for each shape.

Besides the kernels of :mod:`chai.kernels` these are the fused kernels of torch (cuDNN, FlashAttention, memory-efficient
attention) with the queries and keys of the representatives repeated for their members: no scores are saved, but for
short prompts or many clusters they may still be the fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chai.attention.fastest import FASTEST, Candidates, length_class
from chai.attention.sdpa import sdpa_attention, wide_sdpa_attention
from chai.heads import KVHeadMap
from chai.kernels import available, decode, prefill

#: The fused kernels of torch.
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Widest head that the kernels hold in registers.
WIDEST_HEAD = 256


def has_kernels(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels of :mod:`chai.kernels` can compute an attention."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return available(query.device) and half and max(query.shape[3], value.shape[3]) <= WIDEST_HEAD


def clustered_attention_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: KVHeadMap,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Compute clustered attention by what measured fastest; no tensor is read on the host.

    Arguments and result as in :func:`chai.attention.reference.clustered_attention`.
    """
    inputs = (query, key, value, head_map, scaling, mask, softcap)
    candidates = decode_candidates(*inputs) if query.shape[2] == 1 else prefill_candidates(*inputs)
    return FASTEST.run(shape_key(query, key, value, head_map, mask, softcap), candidates, query.device)


def shape_key(
    query: Tensor, key: Tensor, value: Tensor, head_map: KVHeadMap, mask: Tensor | None, softcap: float | None
) -> tuple:
    """Return what the fastest implementation depends on."""
    batch_size, k, q_len, head_dim = query.shape
    lengths = length_class(q_len), length_class(key.shape[2])
    heads = head_map.clusters.num_heads, k, key.shape[1], value.shape[1], head_dim, value.shape[3]
    kind = None if mask is None else str(mask.dtype)
    return ("clustered", batch_size, *lengths, *heads, str(query.dtype), kind, softcap is not None)


def decode_candidates(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: KVHeadMap,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
) -> Candidates:
    """Return the implementations for one token."""

    def run(config: decode.DecodeConfig) -> Tensor:
        tasks = head_map.tasks(value.shape[1], config.members)
        return decode.decode_attention(query, key, value, tasks, scaling, mask=mask, softcap=softcap, config=config)

    return {str(config): partial(run, config) for config in decode.CONFIGS}


def prefill_candidates(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: KVHeadMap,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
) -> Candidates:
    """Return the implementations for several tokens."""

    def run(config: prefill.PrefillConfig) -> Tensor:
        tasks = head_map.tasks(value.shape[1], config.members)
        return prefill.prefill_attention(query, key, value, tasks, scaling, mask=mask, softcap=softcap, config=config)

    tma = prefill.has_descriptors(query, key, value)
    configs = prefill.candidates(max(query.shape[3], value.shape[3]), tma, mask is not None)
    candidates: Candidates = {str(config): partial(run, config) for config in configs}
    if softcap is None:  # which the fused kernels of torch cannot compute
        repeated = partial(sdpa_attention, query, key, value, head_map, scaling, mask)
        candidates |= {f"repeated, {name}": on_backend(name, repeated) for name in BACKENDS}
        if value.shape[1] == head_map.clusters.num_heads:
            wide = partial(wide_sdpa_attention, query, key, value, head_map, scaling, mask)
            candidates["wide values, cudnn"] = on_backend("cudnn", wide)
    return candidates


def fused_mha(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, run: Callable[[], Tensor]) -> Tensor:
    """Compute multi-head attention, which ``run`` computes by a fused kernel of torch, on the fastest one."""
    lengths = length_class(query.shape[2]), length_class(key.shape[2])
    heads = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    kind = None if mask is None else str(mask.dtype)
    shape = ("fused", query.shape[0], *lengths, *heads, str(query.dtype), kind)
    candidates = {"torch's choice": run} | {name: on_backend(name, run) for name in BACKENDS}
    result: Tensor = FASTEST.run(shape, candidates, query.device)
    return result


def on_backend(name: str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return ``run`` with torch's fused attention limited to one of :data:`BACKENDS`."""

    def limited() -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return run()

    return limited
