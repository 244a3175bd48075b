"""Attention on a GPU: the implementations that compete for each shape, of which the fastest is measured once.

Besides the kernels of :mod:`chai.kernels` these are the fused kernels of torch (cuDNN, FlashAttention, memory-efficient
attention). For clustered heads they get the queries and keys of the representatives repeated for their members: no
scores are saved, but for short prompts or many clusters they may still be the fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from chai.attention.dense import dense_attention
from chai.attention.fastest import FASTEST, length_class
from chai.attention.reference import causal_mask, padded_mask
from chai.attention.sdpa import sdpa_attention, wide_sdpa_attention
from chai.heads import KVHeadMap
from chai.kernels import available, decode, is_interpreted, prefill
from chai.kernels.decode import DecodeConfig, decode_attention
from chai.kernels.prefill import PrefillConfig, has_descriptors, prefill_attention
from chai.kernels.tasks import Tasks, build_tasks

OWN_CHOICE = "torch's choice"
#: The fused kernels of torch, and what torch chooses by itself.
BACKENDS = {
    OWN_CHOICE: None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Widest head that the kernels hold in registers.
WIDEST_HEAD = 256
#: Query heads of one value head that the tasks of the kernels can name.
LARGEST_GROUP = 32

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class GpuInputs:
    """The inputs of an attention, ``[B, k, T, D]`` queries of the representatives, or ``[B, H, T, D]`` of all heads."""

    query: Tensor
    key: Tensor  # [B, n, S, D], the stored KV heads
    value: Tensor  # [B, H_kv, S, D_value]
    scaling: float
    head_map: KVHeadMap | None = None  # None: multi-head attention
    mask: Tensor | None = None  # [B or 1, 1, T, S], bool (true: attend) or additive float; None: causal
    softcap: float | None = None
    starts: Tensor | None = None  # int32 [B]: the first token of each row that is not padding, instead of a mask
    kv_len: Tensor | None = None  # int32 [1]: tokens to attend to, if not all S; for one token, instead of a mask
    tasks: Callable[[int], Tasks] | None = None  # of a number of members; None: built from the clusters

    def key_of_shape(self) -> tuple:
        """Return what the fastest implementation depends on."""
        query, key, value = self.query, self.key, self.value
        clusters = None if self.head_map is None else self.head_map.clusters.num_heads
        lengths = length_class(query.shape[2]), length_class(key.shape[2])
        heads = clusters, query.shape[1], key.shape[1], value.shape[1], query.shape[3], value.shape[3]
        hidden = None if self.mask is None else str(self.mask.dtype), self.starts is None, self.kv_len is None
        layout = has_descriptors(query, key, value), query.shape[2] == key.shape[2]
        return (query.shape[0], *lengths, *heads, str(query.dtype), *hidden, self.softcap is None, *layout)

    def find_tasks(self, members: int) -> Tasks:
        """Return the tasks of the kernels; without clusters, every head is one."""
        if self.tasks is not None:
            return self.tasks(members)
        if self.head_map is not None:
            return self.head_map.tasks(self.value.shape[1], members)
        heads = torch.arange(self.query.shape[1], device=self.query.device).expand(len(self.query), -1)
        read = heads // (self.query.shape[1] // self.key.shape[1])
        return build_tasks(heads, read, self.value.shape[1], members)

    def whole_mask(self) -> Tensor | None:
        """Return the mask, with padding and length if there are any."""
        q_len, size = self.query.shape[2], self.key.shape[2]
        if self.starts is None and self.kv_len is None:
            return self.mask
        visible = padded_mask(q_len, size, self.starts, self.kv_len, self.query.device)
        return visible.expand(len(self.query), 1, q_len, size)


def has_kernels(inputs: GpuInputs) -> bool:
    """Whether the kernels of :mod:`chai.kernels` can compute an attention.

    Not in fp32: a GPU multiplies it without tensor cores, and the kernels would spill their registers.
    """
    query, value = inputs.query, inputs.value
    num_heads = query.shape[1] if inputs.head_map is None else inputs.head_map.clusters.num_heads
    known = query.dtype in (torch.float16, torch.bfloat16) or is_interpreted()
    contiguous = query.stride(3) == inputs.key.stride(3) == value.stride(3) == 1
    fits = max(query.shape[3], value.shape[3]) <= WIDEST_HEAD and num_heads <= LARGEST_GROUP * value.shape[1]
    return available(query.device) and known and contiguous and fits


def attention_on_gpu(inputs: GpuInputs) -> Tensor:
    """Compute attention by what measured fastest, ``[B, H, T, D_value]``; no tensor is read on the host."""
    device = inputs.query.device
    with on_device(device):
        name = FASTEST.name(inputs.key_of_shape(), lambda: implementations(_with_own_tasks(inputs)), device)
        return implementations(inputs, name)[name]()


def _with_own_tasks(inputs: GpuInputs) -> GpuInputs:
    """Return the inputs with tasks for a measurement, apart from the caller's, which are kept for each size."""
    plain = replace(inputs, tasks=None)
    return replace(inputs, tasks=cache(plain.find_tasks))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launch kernels on a device inside the block, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def implementations(inputs: GpuInputs, only: str | None = None) -> dict[str, Run]:
    """Return the implementations by name, the default first; with ``only``, that one alone."""
    masked = inputs.mask is not None
    backends = list(BACKENDS) if inputs.query.device.type == "cuda" else [OWN_CHOICE]
    runs: dict[str, Run] = {}
    if has_kernels(inputs):
        width = max(inputs.query.shape[3], inputs.value.shape[3])
        if inputs.query.shape[2] == 1:
            configs = decode.candidates(width)
            runs |= {f"split-KV, {config.label}": partial(_decode, inputs, config) for config in configs}
        else:
            tma = has_descriptors(inputs.query, inputs.key, inputs.value)
            runs |= {
                f"one score, {config.label}": partial(_prefill, inputs, config)
                for config in prefill.candidates(width, tma, masked)
            }
    if inputs.head_map is None:
        fused = {name: _limited(name, partial(_fused, inputs)) for name in backends}
        runs = fused | runs if inputs.kv_len is None else runs | fused
    elif inputs.query.shape[2] > 1 or not runs:
        head_map, softcap = inputs.head_map, inputs.softcap
        arguments = (inputs.query, inputs.key, inputs.value, head_map, inputs.scaling)
        if softcap is None:  # which the fused kernels of torch cannot compute
            repeated = _with_mask(inputs, partial(sdpa_attention, *arguments))
            runs |= {f"repeated, {name}": _limited(name, repeated) for name in backends}
            if inputs.value.shape[1] == head_map.clusters.num_heads and "cudnn" in backends:
                runs["wide values, cudnn"] = _limited("cudnn", partial(_wide, inputs))
    if inputs.head_map is not None and not runs:
        runs["products"] = partial(_products, inputs, inputs.head_map)
    return runs if only is None else {only: runs[only]}


def _with_mask(inputs: GpuInputs, run: Callable[[Tensor | None], Tensor]) -> Run:
    return lambda: run(inputs.whole_mask())


def _decode(inputs: GpuInputs, config: DecodeConfig) -> Tensor:
    return decode_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.find_tasks(config.members),
        inputs.scaling,
        kv_len=inputs.kv_len,
        starts=inputs.starts,
        mask=inputs.mask,
        softcap=inputs.softcap,
        config=config,
    )


def _prefill(inputs: GpuInputs, config: PrefillConfig) -> Tensor:
    return prefill_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.find_tasks(config.members),
        inputs.scaling,
        starts=inputs.starts,
        mask=inputs.mask,
        softcap=inputs.softcap,
        config=config,
    )


def _wide(inputs: GpuInputs) -> Tensor:
    tasks, mask = inputs.find_tasks(2), inputs.whole_mask()
    return wide_sdpa_attention(inputs.query, inputs.key, inputs.value, tasks, inputs.scaling, mask)


def _products(inputs: GpuInputs, head_map: KVHeadMap) -> Tensor:
    mask = inputs.whole_mask()
    return dense_attention(inputs.query, inputs.key, inputs.value, head_map, inputs.scaling, mask, inputs.softcap)


def _fused(inputs: GpuInputs) -> Tensor:
    """Compute multi-head attention by a fused kernel of torch."""
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.whole_mask()
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is None and 1 < q_len < kv_len:
        mask = causal_mask(q_len, kv_len, query.device)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and q_len > 1,
        scale=inputs.scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _limited(name: str, run: Run) -> Run:
    """Return ``run`` with torch's fused attention limited to one of :data:`BACKENDS`."""

    def limited() -> Tensor:
        with on_backend(name):
            return run()

    return limited


def on_backend(name: str) -> AbstractContextManager[None]:
    """Limit torch's fused attention to one of :data:`BACKENDS` inside the block."""
    backend = BACKENDS[name]
    return nullcontext() if backend is None else sdpa_kernel(backend)


def fused_mha(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, run: Run) -> Tensor:
    """Compute multi-head attention, which ``run`` computes by a fused kernel of torch, on the fastest one."""
    lengths = length_class(query.shape[2]), length_class(key.shape[2])
    heads = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    kind = None if mask is None else str(mask.dtype)
    shape = ("fused", query.shape[0], *lengths, *heads, str(query.dtype), kind, query.shape[2] == key.shape[2])
    with on_device(query.device):
        name = FASTEST.name(shape, lambda: {name: _limited(name, run) for name in BACKENDS}, query.device)
        return _limited(name, run)()
