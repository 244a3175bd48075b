"""Joins a model, its cache and cascade pruning (:mod:`chai.cascade`) while a method is applied.

While a context is read pruned tokens and heads are masked, as each of its tokens has its own; nothing is saved there.
Text after it runs on what the cache has kept, without the scores of pruned tokens and heads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

import chai.runtime
from chai.attention import apply_weights, attention_weights, causal_mask, expand_heads, take_heads
from chai.cascade import CascadeCache, CascadeLayer, CascadeRule, keep_top, share_of
from chai.runtime import check_family, own_cache, real_tokens, refuse_options, replaced_forward

ATTENTION = "cascade_pruned_heads"  # our name in transformers' registry


@dataclass
class Call:
    """A call that is running; what its layers hand on to each other while the context lasts.

    Attributes:
        cache: the call's.
        real: bool ``[B, T]``, the new tokens that aren't padding.
        context: bool ``[B, T]``, the new tokens that belong to the context.
        ends: long ``[B]``, the place of the context's last token; -1 where it isn't among them.
        kept: bool ``[B, T, S]``, the tokens that each new one saw in the layer before; ``None``: all before it.
        heads: bool ``[B, T, H]``, the heads that each had there; ``None``: all.
        votes: fp32 ``[B, T, S]``, ``S_{l-1}`` of :mod:`chai.cascade`.
        sizes: fp32 ``[B, T, H]``, ``G_{l-1}``.
    """

    cache: CascadeCache
    real: Tensor
    context: Tensor
    ends: Tensor
    kept: Tensor | None = None
    heads: Tensor | None = None
    votes: Tensor | None = None
    sizes: Tensor | None = None


_CALL: ContextVar[Call | None] = ContextVar("cascade_call", default=None)


def active_cache() -> CascadeCache | None:
    """The cache of the call that is running in this thread."""
    call = _CALL.get()
    return None if call is None else call.cache


def check_cascade(config: PreTrainedConfig) -> None:
    """Refuse a model on which tokens can't be pruned in cascade.

    Raises:
        ValueError: names what isn't supported.
    """
    check_family(config)
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    if any(windows):
        raise ValueError(
            f"token pruning doesn't support sliding windows; this model's is {next(filter(None, windows))} tokens "
            "(valid: models without, or with sliding_window null)"
        )


def new_cascade_cache(config: PreTrainedConfig, rule: CascadeRule, reserve: int = 0) -> CascadeCache:
    """An empty cache for a model of this configuration."""
    return CascadeCache(rule, getattr(config, "num_key_value_heads", None) or config.num_attention_heads, reserve)


@contextmanager
def cascade_pruned(model: PreTrainedModel, rule: CascadeRule) -> Iterator[PreTrainedModel]:
    """Run ``model`` with cascade pruning inside the block; restored afterwards, also after an exception.

    Raises:
        ValueError: the model isn't supported, or a method is applied to it already.
    """
    check_cascade(model.config)
    previous = model.config._attn_implementation
    if previous in (ATTENTION, chai.runtime.ATTENTION):
        raise ValueError("a method is applied to this model already: leave its `with` block first")
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, previous)
        model.set_attn_implementation(ATTENTION)
        stack.enter_context(replaced_forward(model.get_decoder(), _forward_on_cache(model, rule)))
        yield model


def _forward_on_cache(model: PreTrainedModel, rule: CascadeRule) -> Callable:
    """The decoder's forward on a cache of ours, which drops what is pruned once the context is over."""
    original = model.get_decoder().forward
    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        kwargs["past_key_values"] = cache = own_cache(
            kwargs.get("past_key_values"),
            CascadeCache,
            rule,
            lambda: new_cascade_cache(model.config, rule),
            "cascade pruning",
        )
        mask = kwargs.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask is a {type(mask).__name__}; valid: a 2-D or 4-D tensor, or none")
        rows, count = tokens.shape[:2]
        real = real_tokens(mask, rows, count, tokens.device)
        call = Call(cache, real, *cache.advance(real))
        token = _CALL.set(call)
        try:
            output = original(**kwargs)
        finally:
            _CALL.reset(token)
        cache.settle()
        return output

    return forward


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls: ``[B, H, T, D]`` in, ``[B, T, H, D]`` out."""
    call = _CALL.get()
    if call is None:
        raise RuntimeError(
            "pruned attention was called outside a call of the model that the method was applied to "
            "(a part of it was called by itself, or another model shares its config object)"
        )
    refuse_options("cascade pruning", dropout, kwargs)
    index = cast(int, module.layer_idx)
    layer = cast(CascadeLayer, call.cache.layers[index])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _allowed(attention_mask, len(query), query.shape[2], layer.seen, query.device)
    if call.cache.settled:
        out = _after_context(layer, query, key, value, layer.visible(mask), scaling, call.cache.rule.values)
    else:
        out = _in_context(call, index, query, key, value, mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _allowed(mask: Tensor | None, rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool ``[B, T, S]``: what each new token may see of the sequence."""
    if mask is None:
        mask = causal_mask(queries, keys, device)
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask[:, 0].expand(rows, -1, -1)


def _after_context(
    layer: CascadeLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, values: float
) -> Tensor:
    """``[B, H, T, D]``, zero for the heads that are pruned."""
    if layer.left is None:
        return _attend(query, expand_heads(key, query.shape[1]), value, mask, scaling, values)[0]
    left = layer.left
    chosen = take_heads(query, left.queries)
    if layer.key_heads != query.shape[1]:  # else what is stored is just what they read, in their order
        key, value = (take_heads(held, left.places) for held in (key, value))
    found = _attend(chosen, key, value, mask, scaling, values)[0]
    heads = left.queries[:, :, None, None].expand_as(found)
    return found.new_zeros(*query.shape[:3], found.shape[3]).scatter_(1, heads, found)


def _in_context(
    call: Call, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """``[B, H, T, D]`` of a call with tokens of the context, and what they leave behind for the next layer."""
    rule, layer = call.cache.rule, cast(CascadeLayer, call.cache.layers[index])
    for name in ("real", "context", "ends", "kept", "heads", "votes", "sizes"):  # layers may be on several devices
        held = getattr(call, name)
        setattr(call, name, None if held is None else held.to(query.device))
    seen = _choose_tokens(call, layer, rule.tokens[index], mask)
    heads = _choose_heads(call, layer, rule.heads[index], query.shape[1])
    out, weights = _attend(query, expand_heads(key, query.shape[1]), value, seen, scaling, rule.values)
    if heads is not None:
        present = heads.transpose(1, 2)[..., None]  # [B, H, T, 1]
        out, weights = out * present, weights * present
    counts = call.context[..., None]
    # Sums over the tokens up to each one, those of earlier calls included.
    votes = (weights.float().sum(1) * counts).cumsum(1)
    sizes = (out.float().abs().sum(-1).transpose(1, 2) * counts).cumsum(1)
    if layer.votes is not None and layer.sizes is not None:
        votes[:, :, : layer.votes.shape[1]] += layer.votes[:, None]
        sizes += layer.sizes[:, None]
    layer.votes, layer.sizes = votes[:, -1], sizes[:, -1]
    call.votes = votes if call.votes is None else call.votes + votes
    call.sizes = sizes if call.sizes is None else call.sizes + sizes
    return out


def _choose_tokens(call: Call, layer: CascadeLayer, share: float, mask: Tensor) -> Tensor:
    """What each new token sees in this layer: of the context's tokens its own choice, after it the context's last's."""
    if share == 1 or call.votes is None:
        return mask
    rows, count, length = mask.shape
    own = torch.eye(length, dtype=torch.bool, device=mask.device)[length - count :]
    candidates = mask if call.kept is None else mask & call.kept
    kept = keep_top(call.votes.masked_fill(own, torch.inf), candidates, share_of(mask.sum(-1), share))
    call.kept = kept
    place = torch.arange(length, device=mask.device)
    before = torch.nn.functional.pad(call.real, (length - count, 0), value=True)  # whatever is no padding
    later = before & (place > length - count + call.ends[:, None])
    last = kept[torch.arange(rows, device=mask.device), call.ends] | later
    if layer.kept is not None:
        before[:, : layer.kept.shape[1]] = layer.kept
    layer.kept = torch.where(call.ends[:, None] >= 0, last, before)
    return torch.where(call.context[..., None], kept, mask & layer.kept[:, None])


def _choose_heads(call: Call, layer: CascadeLayer, count: int, heads: int) -> Tensor | None:
    """Bool ``[B, T, H]``: the heads that each new token has in this layer, chosen likewise; ``None``: all."""
    if count == heads or call.sizes is None:
        return None
    candidates = torch.ones_like(call.sizes, dtype=torch.bool) if call.heads is None else call.heads
    kept = keep_top(call.sizes, candidates, torch.full_like(call.sizes[..., 0], count))
    call.heads = kept
    last = kept[torch.arange(len(kept), device=kept.device), call.ends]
    before = torch.ones_like(last) if layer.heads is None else layer.heads
    layer.heads = torch.where(call.ends[:, None] >= 0, last, before)
    return torch.where(call.context[..., None], kept, layer.heads[:, None])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, values: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``[B, N, T, D]`` with a mask ``[B, T, S]``, each head reading its values of the largest weights.

    Returns:
        outputs, and weights from before values are left out: ``[B, N, T, S]``, zero where nothing is seen.
    """
    weights = attention_weights(query, key, scaling, mask[:, None]) * mask[:, None]
    read = weights
    if values < 1:
        count = share_of(mask.sum(-1), values)[:, None].expand(weights.shape[:3])
        read = weights * keep_top(weights, mask[:, None].expand_as(weights), count)
    return apply_weights(read, value), weights


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
