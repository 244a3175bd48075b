"""Multi-head attention that a method is compared with: its kernels, and the caches that it decodes on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from chai.attention import causal_mask
from chai.attention.dense import dense_attention
from chai.attention.gpu import on_backend
from chai.cache import GrowingCache
from chai.heads import HeadClusters, KVHeadMap
from chai.methods import baseline
from chai.methods.base import Method
from experiments.benchmarks import harness
from experiments.benchmarks.harness import Timers
from experiments.tables.benchmarks import PRODUCTS

#: Baselines of the model and of a layer, each the name of a kernel, ``_`` and a cache (none: the stock
#: ``DynamicCache``). A prompt is stored once, whichever the cache.
BASELINES = {
    "prefill": ("eager", "sdpa", "sdpa_growing", "products_growing"),
    "decode": ("eager", "sdpa", "eager_growing", "sdpa_growing", "eager_static", "sdpa_static", "products_static"),
}

#: Scores of all heads together above which eager attention and the products, which write them to memory several times,
#: are left out: on a CPU, and on a GPU, where fused kernels are many times faster.
LARGEST_SCORES = (1 << 33, 1 << 30)


@dataclass
class Implementation:
    """A model object with its attention, the method whose caches it reads, and how they are made."""

    model: PreTrainedModel
    method: Method
    new_cache: Callable[[], Cache]


def model_baselines(model: PreTrainedModel, phase: str, length: int) -> dict[str, Implementation]:
    """Return multi-head attention of ``length`` tokens on every kernel and cache of a phase that the model can run."""
    makers: dict[str, Callable[[], Cache]] = {
        "": DynamicCache,
        "growing": GrowingCache,
        "static": partial(static_cache, model.config.get_text_config().num_hidden_layers, length),
    }
    runnable = harness.stock_attentions(model)
    runnable += [PRODUCTS] if "sdpa" in runnable else []  # on the same interface
    names = {name: parts for name in BASELINES[phase] if (parts := name.partition("_"))[0] in runnable}
    twins = {kernel: harness.twin(model, kernel) for kernel in dict.fromkeys(kernel for kernel, _, _ in names.values())}
    return {
        name: Implementation(twins[kernel], baseline(), makers[cache]) for name, (kernel, _, cache) in names.items()
    }


def static_cache(num_layers: int, length: int) -> Cache:
    """Build a cache with the layers of a ``StaticCache`` for full attention, of exactly ``length`` tokens.

    Stock attention reads all that such a layer has allocated, so with more room it would read more than it needs.
    """
    return Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(num_layers)])


def forget_last_token(cache: Cache) -> None:
    """Drop the last token, so that another one can be decoded at the same length."""
    if isinstance(cache.layers[0], StaticLayer):  # it cannot crop
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
    else:
        cache.crop(-1)


def products_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Compute multi-head attention by the products of clustered attention, where every head is a cluster.

    What a method gains over it comes from clustering alone; over other kernels, also from these products.

    Query is ``[B, H, T, D]``, key and value ``[B, H_kv, S, D]``; returns ``[B, H, T, D]``.
    """
    return dense_attention(query, key, value, _all_heads(query, key.shape[1]), scaling, mask)


def _all_heads(query: Tensor, num_kv_heads: int) -> KVHeadMap:
    """Return the map of ``H`` clusters, which is the same for all layers and tokens of a batch."""
    shape = (query.shape[0], query.shape[1], num_kv_heads, query.device)
    if shape not in _MAPS:
        heads = torch.arange(query.shape[1], device=query.device).expand(query.shape[0], -1)
        _MAPS[shape] = KVHeadMap.only_read(HeadClusters(heads, heads), num_kv_heads)
    return _MAPS[shape]


_MAPS: dict[tuple[int, int, int, torch.device], KVHeadMap] = {}


def _products_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: ``[B, H, T, D]`` in, ``[B, T, H, D]`` out."""
    scaling, q_len = query.shape[-1] ** -0.5 if scaling is None else scaling, query.shape[2]
    if attention_mask is None and q_len > 1:  # an empty static cache: what lies behind the prompt is not masked
        key, value = key[:, :, :q_len], value[:, :, :q_len]
    out = products_attention(query, key, value, scaling, attention_mask)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(PRODUCTS, _products_forward)
AttentionMaskInterface.register(PRODUCTS, sdpa_mask)


def fused_kernels(sdpa: Callable[[], object]) -> Timers:
    """Return torch's attention on each fused kernel of the GPU that can compute it."""
    timers: Timers = {}
    for name in ("cudnn", "flash", "efficient"):
        run = partial(_on_backend, name, sdpa)
        try:
            run()
        except RuntimeError:  # not in this build of torch, or not for these shapes
            continue
        timers[name] = run
    return timers


def _on_backend(name: str, sdpa: Callable[[], object]) -> object:
    with on_backend(name):
        return sdpa()


def attention_baselines(query: Tensor, key: Tensor, value: Tensor) -> Timers:
    """Return a closure for each multi-head attention of query ``[B, H, T, D]``, key and value ``[B, H_kv, S, D]``."""
    q_len, kv_len, scaling = query.shape[2], key.shape[2], query.shape[3] ** -0.5
    # Stand-in for the model's attention module, of which the functions read three attributes.
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True, training=False)
    mask = None
    is_large = query.shape[0] * query.shape[1] * q_len * kv_len > LARGEST_SCORES[query.device.type == "cuda"]
    if q_len > 1 and not is_large:
        visible = causal_mask(q_len, kv_len, query.device)
        mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
    sdpa = partial(sdpa_attention_forward, module, query, key, value, None, scaling=scaling)
    timers: Timers = {"sdpa": sdpa}
    if not is_large:
        eager = partial(eager_attention_forward, module, query, key, value, mask, scaling)
        timers = {"eager": eager, **timers, PRODUCTS: partial(products_attention, query, key, value, scaling, None)}
    if query.device.type == "cuda":
        timers |= fused_kernels(sdpa)
    if query.device.type == "cuda" and importlib.util.find_spec("xformers") and query.shape[1] == key.shape[1]:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        inputs = [tensor.transpose(1, 2).contiguous() for tensor in (query, key, value)]
        bias = LowerTriangularMask() if q_len > 1 else None
        timers["xformers"] = partial(memory_efficient_attention, *inputs, attn_bias=bias, scale=scaling)
    return timers
