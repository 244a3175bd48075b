"""Joins a model, its cache and clustered attention while a method is applied, and takes itself out again.

``transformers`` shows the cache no queries and the attention function no cache. The decoder's ``forward`` is wrapped:
it names the call's cache in a context variable, where attention and projections (same thread, same call) find it, and
cuts a prompt after its first tokens. So the membership of all layers is decided at once, from then on everything runs
on representatives alone, and by causality the result is that of one pass. A prompt too short to pay for a pass of its
first tokens (:func:`_one_pass`) isn't cut: each layer then decides its membership as it comes to it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chai.attention import take_heads
from chai.cache import ClusteredCache, ClusteredLayer
from chai.costs import LayerShape, layer_shape
from chai.devices import is_hooked, layer_devices
from chai.growing import GrowingLayer
from chai.kernels import all_heads_attention, attend, shared_values_attention
from chai.membership import MembershipRule
from chai.projections import sliced_projections

ATTENTION = "clustered_heads"  # our name in transformers' registry (its text must not contain "flash" or "sdpa")

#: Families whose attention goes through transformers' dispatch in the order we rely on, each covered by a test.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox")


@dataclass(frozen=True)
class Call:
    """What attention needs to know of the call that is running.

    Attributes:
        cache: the call's.
        plain: nothing is padding, so that each token sees all before it.
        first: while memberships are open, which first tokens are in this call (:meth:`FirstTokens.note`).
        decided: while memberships are open, long indices of the rows that have theirs; ``None``: no row.
        one_pass: all rows' first tokens lead this call, and each layer decides its membership from them.
    """

    cache: ClusteredCache
    plain: bool
    first: tuple[Tensor, Tensor] | None = None
    decided: Tensor | None = None
    one_pass: bool = False


C = TypeVar("C", bound=Cache)
_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def active_cache() -> ClusteredCache | None:
    """The cache of the call that is running in this thread."""
    call = _CALL.get()
    return None if call is None else call.cache


def new_cache(model: PreTrainedModel, rule: MembershipRule, reserve: int = 0) -> ClusteredCache:
    """An empty cache: clustered layers where k < H, plain ones where every head is its own cluster.

    Args:
        model: whose shape it takes.
        rule: of the memberships.
        reserve: tokens to make room for at once, where the length is known; the cache grows beyond it all the same.
    """
    config = model.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = [
        ClusteredLayer(key_heads, reserve, rule.shares_values)
        if rule.clusters_of(index) < heads
        else GrowingLayer(reserve)
        for index in range(config.num_hidden_layers)
    ]
    stock = DynamicCache(config=config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in stock] or [None] * len(layers)
    return ClusteredCache(rule, layers, heads, key_heads, windows)


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
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, previous)
        model.set_attn_implementation(ATTENTION)
        stack.enter_context(sliced_projections(model, active_cache))
        stack.enter_context(replaced_forward(model.get_decoder(), _in_parts(model, rule)))
        yield model


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable, *, inside: bool = False) -> Iterator[None]:
    """Let ``forward`` stand for the module's own inside the block; on this very object, its class stays as it is.

    Args:
        module: whose forward it is.
        forward: takes its place.
        inside: of accelerate's wrapper, where there is one: it then finds the inputs on the module's device, and
            weights that are offloaded as well.
    """
    name = "_old_forward" if inside and is_hooked(module) else "forward"
    own = module.__dict__.get(name)  # a forward that another library (accelerate) has wrapped, or its wrapper
    setattr(module, name, forward)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def check_family(config: PreTrainedConfig) -> None:
    """Refuse a model whose attention isn't known to go through our function.

    Raises:
        ValueError: names the family and the supported ones.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"models of the family '{family}' aren't supported; supported: {', '.join(FAMILIES)}")


def _in_parts(model: PreTrainedModel, rule: MembershipRule) -> Callable:
    """The decoder's forward on a cache of ours, cut wherever some row has seen all its first tokens."""
    original = model.get_decoder().forward
    names = list(inspect.signature(original).parameters)
    shape = layer_shape(model, rule.shares_values)
    on_cpu = all(device.type == "cpu" for device in layer_devices(model))

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        rows, count = tokens.shape[:2]
        kwargs["past_key_values"] = cache = own_cache(
            kwargs.get("past_key_values"),
            ClusteredCache,
            rule,
            lambda: new_cache(model, rule),
            "clustered head attention",
        )
        mask = kwargs.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask is a {type(mask).__name__}; valid: a 2-D or 4-D tensor, or none")
        plain = mask is None or (mask.ndim == 2 and bool(mask.all()))
        if cache.first is None:
            cache.begin(rows, tokens.device)
        assert cache.first is not None
        if len(cache.first.count) != rows:
            raise ValueError(f"the cache holds {len(cache.first.count)} sequences, this call has {rows}")
        if cache.settled:
            return _call(original, Call(cache, plain), kwargs)
        if on_cpu and plain and cache.get_seq_length() == 0 and _one_pass(shape, cache, rows, count):
            cache.decide_in_layers()
            return _call(original, Call(cache, plain, one_pass=True), kwargs)
        real = real_tokens(mask, rows, count, tokens.device)
        offset, outputs, begin = cache.get_seq_length(), [], 0
        for end in sorted({*cache.first.ends(real), count}):
            decided = cache.decided.nonzero()[:, 0] if cache.decided is not None else None
            call = Call(
                cache,
                plain,
                None if cache.settled else cache.first.note(real[:, begin:end], offset + begin),
                decided if decided is not None and len(decided) else None,
            )
            outputs.append(_call(original, call, _part(kwargs, begin, end, count)))
            cache.settle()
            begin = end
        return outputs[0] if len(outputs) == 1 else _join(outputs)

    return forward


#: What another layer of a pass costs on its own (its weights are read, its operations launched), in multiply-adds that
#: could be done in its time: so many, and so many for each entry of its weights.
LAYER_OVERHEAD, WEIGHT_OVERHEAD = 140_000_000, 40


def _one_pass(shape: LayerShape, cache: ClusteredCache, rows: int, count: int) -> bool:
    """Whether a prompt is faster uncut: with all heads' Q and K projected, but the first tokens not by themselves.

    On a CPU; on an accelerator, a decision in every layer would wait for the device as many times.
    """
    first = cache.rule.tokens
    if not first < count:
        return False
    saved = sum(shape.weights(shape.heads) - shape.weights(cache.rule.clusters_of(i)) for i, _ in cache.clustered)
    layers = len(cache.layers)
    cost = layers * (LAYER_OVERHEAD + WEIGHT_OVERHEAD * shape.weights(shape.heads))
    return rows * (count - first) * saved < cost


def _call(original: Callable, call: Call, kwargs: dict[str, Any]) -> Any:
    token = _CALL.set(call)
    try:
        return original(**kwargs)
    finally:
        _CALL.reset(token)


def real_tokens(mask: Tensor | None, rows: int, count: int, device: torch.device) -> Tensor:
    """Bool ``[B, T]``: the new tokens that aren't padding, that is, that anything may attend to."""
    if mask is None:
        return torch.ones(rows, count, dtype=torch.bool, device=device)
    if mask.ndim == 4:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = allowed.any(2)[:, 0]
    return mask[:, -count:].bool().expand(rows, -1)


def _part(kwargs: dict[str, Any], begin: int, end: int, count: int) -> dict[str, Any]:
    """The arguments of a call for its tokens from ``begin`` to ``end`` (of ``count``) alone."""
    part = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if part.get(name) is not None:
            part[name] = part[name][:, begin:end]
    mask = part.get("attention_mask")
    if mask is not None:
        seen = mask.shape[-1] - count + end
        part["attention_mask"] = mask[:, :seen] if mask.ndim == 2 else mask[:, :, begin:end, :seen]
    return part


def _join(parts: list[Any]) -> Any:
    """Outputs of the parts of a call as those of the whole; tokens are dimension 1 of every tensor."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts, 1)
    if isinstance(first, dict):  # transformers' ModelOutput
        return type(first)(**{name: _join([part[name] for part in parts]) for name in first})
    if isinstance(first, tuple):
        return tuple(_join(list(items)) for items in zip(*parts, strict=True))
    assert first is None or isinstance(first, Cache)
    return first


def own_cache(cache: object, kind: type[C], rule: object, fresh: Callable[[], C], what: str) -> C:
    """The call's cache as one of ours: a new one for none, an empty DynamicCache (``generate`` makes one) in place.

    Args:
        cache: the call's.
        kind: of cache that is wanted; has the ``rule`` it was made for.
        rule: of the method that is applied.
        fresh: makes a new one.
        what: needs it, for messages.

    Raises:
        ValueError: a cache of another kind, one that holds tokens already, or one of another method.
    """
    if cache is None:
        return fresh()
    if isinstance(cache, kind):
        if cache.rule != rule:  # type: ignore[attr-defined]
            raise ValueError(f"this {kind.__name__} belongs to another application of a method; start a new one")
        return cache
    if type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading:
        # The caller keeps its reference to this very object, so it becomes ours instead of being replaced.
        cache.__dict__.update(fresh().__dict__)
        cache.__class__ = kind  # type: ignore[assignment]
        return cast(C, cache)
    raise ValueError(
        f"{what} can't use this {type(cache).__name__}: "
        "pass no cache, an empty DynamicCache, or method.new_cache(model)"
    )


def refuse_options(what: str, dropout: float, options: dict[str, Any]) -> None:
    """Refuse what a model asks of its attention and ours doesn't do.

    Raises:
        ValueError: names it.
    """
    refused = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if dropout or refused:
        raise ValueError(f"{what} doesn't support {', '.join(refused) or 'dropout'}")


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
            "clustered attention was called outside a call of the model that the method was applied to "
            "(a part of it was called by itself, or another model shares its config object)"
        )
    refuse_options("clustered head attention", dropout, kwargs)
    index = cast(int, module.layer_idx)
    layer, window = cast(GrowingLayer, call.cache.layers[index]), call.cache.windows[index]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def all_heads() -> Tensor:  # just what the model does by itself
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]

    plain = call.plain and (window is None or value.shape[2] <= window)
    mask = None if plain else attention_mask
    settled = layer.compacted if isinstance(layer, ClusteredLayer) else True
    if settled and query.shape[2] == 1 and query.dtype.itemsize == 2 and query.device.type == "cpu":
        key, value, mask = layer.padded(mask)
    if not isinstance(layer, ClusteredLayer):
        out = all_heads_attention(query, key, value, scaling, mask, all_heads)
    elif layer.compacted:
        assert layer.plan is not None
        representatives = layer.plan.clusters.representatives
        if query.shape[1] != representatives.shape[1]:  # a model whose projections can't be sliced
            query = take_heads(query, representatives)
        out = _on_representatives(layer)(query, key, value, layer.plan, scaling, mask)
    elif call.one_pass:
        out = _decide_and_attend(call.cache, index, query, key, value, scaling, mask)
    else:
        assert call.first is not None
        layer.observe(query, *call.first, scaling)
        out = all_heads()
        if call.decided is not None and layer.plan is not None:
            rows = call.decided.to(out.device)
            plan = layer.plan.map_rows(lambda tensor: tensor[rows])
            own = mask[rows] if mask is not None and len(mask) > 1 else mask
            chosen = take_heads(query[rows], plan.clusters.representatives)
            found = _on_representatives(layer)(chosen, key[rows], value[rows], plan, scaling, own)
            out = out.index_copy(0, rows, found)
    return out.contiguous(), None


def _on_representatives(layer: ClusteredLayer) -> Callable[..., Tensor]:
    """What attends for the members of the layer's clusters: with their own values, or with the representative's."""
    return shared_values_attention if layer.shares_values else attend


def _decide_and_attend(
    cache: ClusteredCache, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """A whole prompt through one layer: its first tokens with all heads, the others on the representatives' alone."""
    layer, count = cast(ClusteredLayer, cache.layers[index]), cache.rule.tokens
    queries, keys, values = (tensor[:, :, :count].contiguous() for tensor in (query, key, value))
    plan = layer.decide_now(index, queries, keys, cache.rule, scaling)
    start = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if mask is None else mask[:, :, :count, :count],
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    chosen = take_heads(query[:, :, count:], plan.clusters.representatives)
    assert layer.keys is not None
    assert layer.values is not None
    left = None if mask is None else mask[:, :, count:]
    rest = _on_representatives(layer)(chosen, layer.keys, layer.values, plan, scaling, left)
    return torch.cat([start.transpose(1, 2), rest], 1)


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
