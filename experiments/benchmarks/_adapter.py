"""The interface of methods and caches that the library is about to have, over the library of today.

To be deleted: each function becomes the method, or the function of ``chai.cache``, of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chai.cache import ClusteredCache, ClusteredLayer
from chai.cache import cache_bytes as cache_bytes
from chai.cascade import CascadeCache
from chai.clustering import HeadClusters
from chai.costs import LayerShape, model_decode_entries, model_prefill_flops
from chai.costs import layer_shape as shape_of
from chai.flops import method_flops
from chai.kernels import all_heads_attention, attend, shared_values_attention
from chai.kernels.plan import HeadPlan
from chai.methods import Mha, Spatten
from chai.methods.base import ClusteredMethod, Method


def baseline() -> Method:
    return Mha()


def _shares(method: Method) -> bool:
    return isinstance(method, ClusteredMethod) and method.shares_values


def prompt_flops(method: Method, model: PreTrainedModel, q_len: int) -> int:
    return method_flops(model, method, q_len)


def prefill_flops(method: Method, model: PreTrainedModel, q_len: int) -> float:
    if not isinstance(method, ClusteredMethod):
        return method_flops(model, method, q_len)
    return model_prefill_flops(model, q_len, method.heads_kept(model.config), method.shares_values)


def decode_bytes(method: Method, model: PreTrainedModel, kv_len: int, batch_size: int) -> float:
    if not isinstance(method, (ClusteredMethod, Mha)):
        return math.nan
    counts = method.heads_kept(model.config)
    once, whole = (model_decode_entries(model, tokens, counts, _shares(method)) for tokens in (0, kv_len))
    return model.dtype.itemsize * (once + batch_size * (whole - once))


def layer_shape(method: Method, model: PreTrainedModel) -> LayerShape:
    return shape_of(model, _shares(method))


def with_num_clusters(method: Method, k: int) -> Method | None:
    return method.with_count(k) if isinstance(method, ClusteredMethod) else None


def benchmark_counts(method: Method, config: PreTrainedConfig, requested: list[int] | None) -> list[int]:
    if not isinstance(method, ClusteredMethod):
        return [config.num_attention_heads]
    return requested or sorted(set(method.heads_kept(config)))


def attention_timer(
    method: Method, query: Tensor, key: Tensor, value: Tensor, k: int, scaling: float
) -> Callable[[], object] | None:
    if not isinstance(method, ClusteredMethod):
        return None
    rows, heads, _, size = query.shape
    key_heads, length = key.shape[1:3]
    if k == heads:
        module = nn.Module()
        module.num_key_value_groups, module.is_causal = heads // key_heads, True
        module.eval()
        stock = lambda: sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0]  # noqa: E731
        return lambda: all_heads_attention(query, key, value, scaling, None, stock)
    assignment = (torch.arange(heads, device=query.device) % k).expand(rows, -1)
    clusters = HeadClusters(assignment, torch.arange(k, device=query.device).expand(rows, -1))
    plan = HeadPlan.with_read_keys(clusters, key_heads)
    index = plan.kept[:, :, None, None].expand(-1, -1, length, size)
    kept, chosen = key.gather(1, index), query[:, :k].contiguous()
    if method.shares_values:
        read = value.gather(1, index)
        return lambda: shared_values_attention(chosen, kept, read, plan, scaling, None)
    return lambda: attend(chosen, kept, value, plan, scaling, None)


def warmup_tokens(method: Method) -> int:
    return method.first_tokens if isinstance(method, ClusteredMethod) else 0


def clustering_timer(method: Method, model: PreTrainedModel, batch_size: int) -> Callable[[], object] | None:
    if not isinstance(method, ClusteredMethod) or not method.first_tokens:
        return None
    shape, tokens = shape_of(model), method.first_tokens
    counts = method.heads_kept(model.config)
    layers = [index for index, k in enumerate(counts) if k < shape.heads]
    if not layers:
        return None
    query = torch.randn(len(layers), batch_size, shape.heads, tokens, shape.size, device=model.device)
    key = torch.randn(len(layers), batch_size, shape.key_heads, tokens, shape.size, device=model.device)
    return lambda: method.decide(layers, [counts[i] for i in layers], query, key, shape.size**-0.5)


def real_prefix(method: Method, kv_len: int) -> int:
    return kv_len if isinstance(method, Spatten) else min(5, kv_len)


def expected_cache_bytes(method: Method, model: PreTrainedModel, cache: Cache) -> int:
    counts = (method if method.saving == "real" else Mha()).heads_kept(model.config)  # a mask drops nothing
    shape, itemsize, rows = shape_of(model), model.dtype.itemsize, cache.layers[0].keys.shape[0]
    total = 0
    for index, (layer, k) in enumerate(zip(cache.layers, counts, strict=True)):
        kept = shape.kept_keys(k)
        if isinstance(cache, CascadeCache):
            context = math.ceil(cache.rule.tokens[index] * cache.split - 1e-9)
            both = 2 * (layer.left.stored.shape[1] if layer.left is not None else shape.key_heads)
            total += rows * (context + cache.get_seq_length() - cache.split) * shape.size * both * itemsize
            continue
        if isinstance(layer, ClusteredLayer) and shape.key_heads != shape.heads and isinstance(cache, ClusteredCache):
            clusters = cache.clusters(index)
            assert clusters is not None
            groups = clusters.representatives // (shape.heads // shape.key_heads)
            kept = max(len(set(row)) for row in groups.tolist())
        values = kept if isinstance(layer, ClusteredLayer) and layer.shares_values else shape.key_heads
        total += rows * cache.get_seq_length() * shape.size * (kept + values) * itemsize
    return total


def set_context_lengths(method: Method, cache: Any, lengths: Tensor) -> None:
    if isinstance(cache, CascadeCache):
        cache.contexts = lengths


def cache_bytes_mha(cache: Any) -> int:
    return getattr(cache, "nbytes_mha", cache_bytes(cache))


def allocated_bytes(cache: Any) -> int:
    return getattr(cache, "nbytes_allocated", cache_bytes(cache))


def stored_kv_heads(cache: Cache) -> list[int]:
    return [layer.keys.shape[1] for layer in cache.layers]
