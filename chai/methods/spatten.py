"""SpAtten: cascade pruning of tokens and heads (Wang et al., HPCA 2021, https://arxiv.org/abs/2012.09852).

``S_l[i, j]`` is the attention that token ``j`` was given up to layer ``l`` by the tokens up to ``i``, and ``G_l[i, h]``
the magnitude of head ``h``'s outputs there (Section III),

    S_l[i, j] = sum over l' <= l, i' <= i, heads h of A_{l',h}[i', j],
    G_l[i, h] = sum over l' <= l, i' <= i of |y_{l',h}[i']|_1.

In layer ``l`` a token ``i`` of the context sees the top tokens by ``S_{l-1}[i]`` among those that it saw in the layer
before, itself always among them, and has the top heads by ``G_{l-1}[i]`` among those that it had there. So no token
depends on a later one. What the last token of the context sees and has, all text after it sees of the context and has:
that stays in the cache. Scores of padding and of text after the context do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from chai.attention import apply_weights, attention_weights, causal_mask
from chai.cache import vector_bytes
from chai.cache.cascade import CascadeCache, CascadeLayer, CascadeRule
from chai.flops import LayerFlops
from chai.heads import repeat_kv, take_heads
from chai.methods.base import Method, Saving
from chai.patching.apply import AttentionInputs, Decoder, ForwardPass, adopt_cache, patched, running
from chai.patching.model_info import check_family, num_kv_heads, sliding_windows


@dataclass
class Spatten(Method):
    """Cascade token pruning, cascade head pruning, and local value pruning (Sections III-A to III-C).

    What one layer prunes stays pruned in all later ones. Each token of the context is pruned by the importance that it
    and the tokens before it gave. Text after the context (generated, or a continuation that is scored) sees what the
    last token of the context sees, is never pruned itself, and gives no importance. The context is the tokens of the
    first call, unless lengths were set with :meth:`set_context_lengths`.

    Pruned tokens and heads leave the cache, keys and values, when the context is over: that saving is real, and so is
    that of decoding. While the context is read, pruning is a mask.

    Attributes:
        tokens: Share of the tokens that the last layer keeps.
        heads: Share of the heads that the last layer keeps.
        values: Share of the values that each head reads for a token, those of the largest weights (a mask).
        unpruned_tokens: Share of the layers, from the first, that keep all tokens; from there the share kept falls
            linearly to ``tokens``. The first layer always keeps all.
        unpruned_heads: The same for heads.

    Raises:
        ValueError: A value outside its choices.
    """

    tokens: float = 0.5
    heads: float = 0.75
    values: float = 1.0
    unpruned_tokens: float = 0.15
    unpruned_heads: float = 0.3

    saving: ClassVar[Saving] = "real"

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "values"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: above 0, up to 1")
        for name in ("unpruned_tokens", "unpruned_heads"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: 0 to 1")

    def rule(self, config: PreTrainedConfig) -> CascadeRule:
        """Return what each layer of such a model keeps."""
        num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
        tokens = schedule(num_layers, self.unpruned_tokens, self.tokens)
        shares = schedule(num_layers, self.unpruned_heads, self.heads)
        return CascadeRule(tokens, tuple(max(1, math.ceil(share * num_heads - 1e-9)) for share in shares), self.values)

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply to ``model`` inside a ``with`` block."""
        self.check(model.config)
        return nullcontext(model) if self._prunes_nothing(model.config) else self._apply(model)

    @contextmanager
    def _apply(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        rule = self.rule(model.config)

        def forward(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
            call = decoder.parse(args, kwargs)
            call.kwargs["past_key_values"], cache = adopt_cache(
                call.kwargs.get("past_key_values"),
                CascadeCache,
                rule,
                lambda: CascadeCache.empty(rule, num_kv_heads(model.config)),
                "cascade pruning",
            )
            real = call.real_tokens()
            with cache.state.attach(), running(CascadePass(cache, real, *cache.advance(real))):
                output = decoder.forward(**call.kwargs)
            cache.prune_if_over()
            return output

        with patched(model, forward):
            yield model

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """Build an empty :class:`chai.cache.cascade.CascadeCache`; the stock cache where nothing is pruned."""
        if self._prunes_nothing(model.config):
            return super().new_cache(model)
        return CascadeCache.empty(self.rule(model.config), num_kv_heads(model.config), reserve)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Return the heads of each layer that are not pruned."""
        return list(self.rule(config).heads)

    def layer_flops(self, config: PreTrainedConfig) -> list[LayerFlops]:
        """Kept tokens and heads: a pruned token is gone, with its own queries, outputs and MLP."""
        layers = zip(super().layer_flops(config), self.rule(config).tokens, strict=True)
        return [replace(layer, tokens=share, read=self.values) for layer, share in layers]

    def expected_cache_bytes(self, model: PreTrainedModel, cache: Cache) -> int:
        """Count each layer's share of the context, all later tokens, and the KV heads that are left."""
        if self._prunes_nothing(model.config):
            return super().expected_cache_bytes(model, cache)
        view, vectors = CascadeCache.of(cache), 0
        for layer, share in zip(view.pruned_layers, view.rule.tokens, strict=True):
            context = math.ceil(share * view.state.split - 1e-9)
            heads = layer.num_kv_heads if layer.remaining is None else layer.remaining.stored.shape[1]
            vectors += (context + view.get_seq_length() - view.state.split) * 2 * heads
        return vector_bytes(cache) * vectors

    def set_context_lengths(self, cache: Cache, lengths: Tensor) -> None:
        """Set the number of context tokens of each row."""
        if isinstance(cache, CascadeCache):
            cache.contexts = lengths

    def real_prefix(self, kv_len: int) -> int:
        """Return all tokens: importance is summed over the whole context."""
        return kv_len

    def note(self, config: PreTrainedConfig) -> str:
        """Return the share of tokens kept per layer, and where the saving is real."""
        shares = ", ".join(f"{share:.2f}" for share in self.rule(config).tokens)
        return (
            f"spatten keeps {shares} of the tokens; real in the cache and in decoding, a mask while the prompt is read"
        )

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a family that is not supported, and sliding windows."""
        check_family(config)
        if any(windows := sliding_windows(config)):
            raise ValueError(
                f"token pruning does not support sliding windows; this model's is {next(filter(None, windows))} tokens "
                "(valid: models without, or with sliding_window null)"
            )

    def _prunes_nothing(self, config: PreTrainedConfig) -> bool:
        rule = self.rule(config)
        return rule == CascadeRule((1.0,) * len(rule.tokens), (config.num_attention_heads,) * len(rule.heads), 1.0)


def schedule(num_layers: int, unpruned: float, last: float) -> tuple[float, ...]:
    """Return the share that each layer keeps: all in the first ones, then falling linearly to ``last``."""
    first = max(1, math.ceil(unpruned * num_layers - 1e-9))
    falling = (max(0, layer - first + 1) / max(1, num_layers - first) for layer in range(num_layers))
    return tuple(1 - (1 - last) * part for part in falling)


@dataclass
class CascadePass(ForwardPass):
    """One call of the decoder; what its layers pass on to each other while the context lasts.

    Attributes:
        kept_tokens: Bool ``[B, T, S]``, the tokens that each new one saw in the layer before; ``None``: all before it.
    """

    cache: CascadeCache  # of the call
    real: Tensor  # bool [B, T], the new tokens that are not padding
    context: Tensor  # bool [B, T], the new tokens that belong to the context
    ends: Tensor  # long [B], the index of the context's last token; -1 where it is not among them
    kept_tokens: Tensor | None = None
    kept_heads: Tensor | None = None  # bool [B, T, H], the heads that each had there; None: all
    votes: Tensor | None = None  # fp32 [B, T, S], S_{l-1}
    sizes: Tensor | None = None  # fp32 [B, T, H], G_{l-1}

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Compute one layer's attention, ``[B, T, H, D]``."""
        layer, q_len = self.cache.pruned_layers[inputs.layer_idx], inputs.query.shape[2]
        mask = inputs.mask
        if mask is None:
            mask = causal_mask(q_len, layer.seen, inputs.query.device)
        if mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        mask = mask[:, 0].expand(len(inputs.query), -1, -1)  # [B, T, S]
        if self.cache.state.is_pruned:
            return self._attend_after_context(layer, inputs, layer.visible(mask)).transpose(1, 2)
        return self._attend_in_context(layer, inputs, mask).transpose(1, 2)

    def _attend_after_context(self, layer: CascadeLayer, inputs: AttentionInputs, mask: Tensor) -> Tensor:
        """Attend to what is stored; returns ``[B, H, T, D]``, zero for pruned heads."""
        query, key, value, share = inputs.query, inputs.key, inputs.value, self.cache.rule.values
        if layer.remaining is None:
            key = repeat_kv(key, query.shape[1])
            return attend_top_values(query, key, value, mask, inputs.scaling, share, inputs.softcap)[0]
        remaining = layer.remaining
        remaining_query = take_heads(query, remaining.query_heads)
        if layer.num_kv_heads != query.shape[1]:  # else the stored heads are just those read, in order
            key, value = take_heads(key, remaining.kv_heads), take_heads(value, remaining.kv_heads)
        out = attend_top_values(remaining_query, key, value, mask, inputs.scaling, share, inputs.softcap)[0]
        heads = remaining.query_heads[:, :, None, None].expand_as(out)
        return out.new_zeros(*query.shape[:3], out.shape[3]).scatter_(1, heads, out)

    def _attend_in_context(self, layer: CascadeLayer, inputs: AttentionInputs, mask: Tensor) -> Tensor:
        """Attend in a call with tokens of the context, and sum up importance; returns ``[B, H, T, D]``."""
        query, rule = inputs.query, self.cache.rule
        for name in ("real", "context", "ends", "kept_tokens", "kept_heads", "votes", "sizes"):
            tensor = getattr(self, name)  # layers may be on several devices
            setattr(self, name, None if tensor is None else tensor.to(query.device))
        # Prune by the importance from the layers before.
        visible = self._choose_tokens(layer, rule.tokens[inputs.layer_idx], mask)
        heads = self._choose_heads(layer, rule.heads[inputs.layer_idx], query.shape[1])
        key = repeat_kv(inputs.key, query.shape[1])
        scaling, softcap = inputs.scaling, inputs.softcap
        out, weights = attend_top_values(query, key, inputs.value, visible, scaling, rule.values, softcap)
        if heads is not None:
            present = heads.transpose(1, 2)[..., None]  # [B, H, T, 1]
            out, weights = out * present, weights * present
        # Sum the importance over the tokens up to each one, those of earlier calls included.
        counts = self.context[..., None]
        votes = (weights.float().sum(1) * counts).cumsum(1)
        sizes = (out.float().abs().sum(-1).transpose(1, 2) * counts).cumsum(1)
        if layer.votes is not None and layer.sizes is not None:
            votes[:, :, : layer.votes.shape[1]] += layer.votes[:, None]
            sizes += layer.sizes[:, None]
        layer.votes, layer.sizes = votes[:, -1], sizes[:, -1]
        self.votes = votes if self.votes is None else self.votes + votes
        self.sizes = sizes if self.sizes is None else self.sizes + sizes
        return out

    def _choose_tokens(self, layer: CascadeLayer, share: float, mask: Tensor) -> Tensor:
        """Choose what each new token sees: tokens of the context choose, later ones see what its last token sees."""
        if share == 1 or self.votes is None:
            return mask
        batch_size, q_len, kv_len = mask.shape
        diagonal = torch.eye(kv_len, dtype=torch.bool, device=mask.device)[kv_len - q_len :]
        candidates = mask if self.kept_tokens is None else mask & self.kept_tokens
        importance = self.votes.masked_fill(diagonal, torch.inf)  # a token always sees itself
        kept = keep_top(importance, candidates, share_of(mask.sum(-1), share))
        self.kept_tokens = kept
        # Note what the last token of the context sees, and all tokens after it.
        position = torch.arange(kv_len, device=mask.device)
        visible = functional.pad(self.real, (kv_len - q_len, 0), value=True)
        later = visible & (position > kv_len - q_len + self.ends[:, None])
        last = kept[torch.arange(batch_size, device=mask.device), self.ends] | later
        if layer.kept_tokens is not None:
            visible[:, : layer.kept_tokens.shape[1]] = layer.kept_tokens
        layer.kept_tokens = torch.where(self.ends[:, None] >= 0, last, visible)
        return torch.where(self.context[..., None], kept, mask & layer.kept_tokens[:, None])

    def _choose_heads(self, layer: CascadeLayer, count: int, num_heads: int) -> Tensor | None:
        """Choose the heads that each new token has, bool ``[B, T, H]``; ``None``: all."""
        if count == num_heads or self.sizes is None:
            return None
        candidates = torch.ones_like(self.sizes, dtype=torch.bool) if self.kept_heads is None else self.kept_heads
        kept = keep_top(self.sizes, candidates, torch.full_like(self.sizes[..., 0], count))
        self.kept_heads = kept
        last = kept[torch.arange(len(kept), device=kept.device), self.ends]
        before = torch.ones_like(last) if layer.kept_heads is None else layer.kept_heads
        layer.kept_heads = torch.where(self.ends[:, None] >= 0, last, before)
        return torch.where(self.context[..., None], kept, layer.kept_heads[:, None])


def share_of(count: Tensor, share: float) -> Tensor:
    """Return ``share`` of each count, rounded up, at least 1 (long)."""
    return (count.double() * share - 1e-9).ceil().long().clamp(min=1)


def keep_top(scores: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """Return bool ``[..., N]``: the ``count`` (``[...]``) candidates of the largest scores, ties by lowest index.

    Scores are equal if they differ by rounding: heads that read the same value head have the same output for the first
    token, for instance.
    """
    largest = scores.masked_fill(~candidates, 0).abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scores = (scores / largest * 2**16).round()
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(-1) < count[..., None]) & candidates


def attend_top_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    values: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with a mask ``[B, T, S]``, each head reading its values of the largest weights (Section III-C).

    Returns:
        Outputs ``[B, N, T, D]``, and weights ``[B, N, T, S]`` before values are pruned, zero where nothing is seen.
    """
    weights = attention_weights(query, key, scaling, mask[:, None], softcap) * mask[:, None]
    top = weights
    if values < 1:
        count = share_of(mask.sum(-1), values)[:, None].expand(weights.shape[:3])
        top = weights * keep_top(weights, mask[:, None].expand_as(weights), count)
    return apply_weights(top, value), weights
