"""Joins a model, its cache and clustered attention while a method is applied, and takes itself out again.

``transformers`` shows the cache no queries and the attention function no cache. A hook on the model sees every call's
cache first and names it in a context variable, where the attention function (same thread, same call) finds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chai.attention import causal_mask, clustered_attention, multi_head_attention
from chai.cache import ClusteredCache, ClusteredLayer
from chai.membership import FirstTokens, MembershipRule

ATTENTION = "clustered_heads"  # our name in transformers' registry (its text must not contain "flash" or "sdpa")

#: Families whose attention goes through transformers' dispatch in the order we rely on, each covered by a test.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox")

_ACTIVE: ContextVar[ClusteredCache | None] = ContextVar("active_cache", default=None)


def active_cache() -> ClusteredCache | None:
    """The cache of the call that is running in this thread."""
    return _ACTIVE.get()


def new_cache(model: PreTrainedModel, rule: MembershipRule) -> ClusteredCache:
    """An empty cache: clustered layers where k < H, plain ones where every head is its own cluster."""
    heads = model.config.num_attention_heads
    layers: list = [
        ClusteredLayer(rule, index) if rule.clusters_of(index) < heads else DynamicLayer()
        for index in range(model.config.num_hidden_layers)
    ]
    stock = DynamicCache(config=model.config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in stock] or [None] * len(layers)
    return ClusteredCache(rule, layers, windows)


@contextmanager
def clustered(model: PreTrainedModel, rule: MembershipRule) -> Iterator[PreTrainedModel]:
    """Run ``model`` with clustered head attention inside the block; restored afterwards, also after an exception.

    Raises:
        ValueError: the model's family isn't supported, or a method is applied to the model already.
    """
    check_family(model.config)
    previous = model.config._attn_implementation
    if previous == ATTENTION:
        raise ValueError("a clustering method is applied to this model already: leave its `with` block first")
    names = list(inspect.signature(model.forward).parameters)

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        kwargs["past_key_values"] = cache = _own_cache(kwargs.get("past_key_values"), model, rule)
        _ACTIVE.set(cache)
        return (), kwargs

    def after(*_: object) -> None:
        _ACTIVE.set(None)

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        model.set_attn_implementation(ATTENTION)
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(previous)


def check_family(config: PreTrainedConfig) -> None:
    """Refuse a model whose attention isn't known to go through our function.

    Raises:
        ValueError: names the family and the supported ones.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"models of the family '{family}' aren't supported; supported: {', '.join(FAMILIES)}")


def _own_cache(cache: object, model: PreTrainedModel, rule: MembershipRule) -> ClusteredCache:
    """The call's cache as one of ours: a new one for none, an empty DynamicCache (``generate`` makes one) in place.

    Raises:
        ValueError: a cache of another kind, one that holds tokens already, or one of another method.
    """
    if cache is None:
        return new_cache(model, rule)
    if isinstance(cache, ClusteredCache):
        if cache.rule != rule:
            raise ValueError("this ClusteredCache belongs to another application of a method; start a new one")
        return cache
    if type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading:
        # The caller keeps its reference to this very object, so it becomes ours instead of being replaced.
        cache.__dict__.update(new_cache(model, rule).__dict__)
        cache.__class__ = ClusteredCache  # type: ignore[assignment]
        return cast(ClusteredCache, cache)
    raise ValueError(
        f"clustered head attention can't use this {type(cache).__name__}: "
        "pass no cache, an empty DynamicCache, or method.new_cache(model)"
    )


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls: ``[B, H, T, D]`` in, ``[B, T, H, D]`` out."""
    cache = active_cache()
    if cache is None:
        raise RuntimeError(
            "clustered attention was called outside a call of the model that the method was applied to "
            "(a part of it was called by itself, or another model shares its config object)"
        )
    layer = cache.layers[module.layer_idx]  # type: ignore[index]
    if not isinstance(layer, ClusteredLayer):  # k = H: stock attention, so nothing at all changes
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if dropout or refused:
        raise ValueError(f"clustered head attention doesn't support {', '.join(refused) or 'dropout'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(layer, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    layer: ClusteredLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attention of one layer for one call: clustered from the token on at which a row's membership is known.

    The first real tokens of each row use all heads (paper, section 3.3), whether they come in one call with the rest
    or token by token; so the result doesn't depend on how a prompt is cut into calls.
    """
    if layer.compacted:
        assert layer.clusters is not None
        return clustered_attention(query, key, value, layer.clusters, scaling, mask, layer.key_heads)
    if mask is None:
        mask = causal_mask(query.shape[2], value.shape[2], query.device)
    visible = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(2)[:, 0]
    order = layer.observe(query, visible.expand(len(query), -1), scaling)
    if layer.clusters is None:
        return multi_head_attention(query, key, value, scaling, mask)
    out = clustered_attention(query, key, value, layer.clusters, scaling, mask)
    if layer.first is not None and layer.first.tokens:
        out = _restore_first_tokens(out, layer.first, order, query, key, value, mask, scaling)
    if layer.all_decided:
        layer.compact()
    return out


def _restore_first_tokens(
    out: Tensor,
    first: FirstTokens,
    order: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """``out`` with each row's first real tokens taken from all heads; an undecided row has no others yet."""
    offset = value.shape[2] - query.shape[2]
    rows = first.pick(mask.expand(len(query), -1, -1, -1), offset)  # [B, 1, tokens, S]
    exact = multi_head_attention(first.pick(query, offset), key, value, scaling, rows)  # [B, H, tokens, D]
    order = order[:, None, :, None]  # [B, 1, T, 1]
    index = order.clamp(0, first.tokens - 1).expand(-1, out.shape[1], -1, out.shape[3])
    return torch.where((order >= 0) & (order < first.tokens), exact.gather(2, index), out)


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
