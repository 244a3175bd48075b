"""Attention under cascade pruning (SpAtten, Wang et al., HPCA 2021, Algorithm 1 and Sections III-A to III-C).

While a context is read, the layers sum up how much attention each token gets and how large each head's outputs are, and
choose by these sums what to keep. Pruning is a mask there: what is pruned is computed, but nothing reads it. After the
context only what was kept is stored. :class:`GlobalPass` is the published algorithm, with one choice for the whole
sequence; under :class:`PerRowPass` every row of the attention matrix, that is every token, chooses for itself.

Shapes: B batch size, H query heads, T new tokens, S all tokens, D head_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.attention import apply_weights, attention_weights, causal_mask
from chai.cache.cascade import CascadeCache, CascadeLayer
from chai.heads import repeat_kv, take_heads
from chai.patching.apply import AttentionInputs, ForwardPass


@dataclass
class CascadePass(ForwardPass):
    """One call of the decoder; what its layers pass on to each other while the context lasts."""

    cache: CascadeCache  # of the call
    real: Tensor  # bool [B, T], the new tokens that are not padding
    context: Tensor  # bool [B, T], the new tokens that belong to the context
    ends: Tensor  # long [B], the index of the context's last token; -1 where it is not among them
    kept_tokens: Tensor | None = None  # bool, the tokens that the layer before kept; None: all
    kept_heads: Tensor | None = None  # bool, the heads that it kept; None: all
    votes: Tensor | None = None  # fp32, importance of the tokens, up to the layer before
    sizes: Tensor | None = None  # fp32, importance of the heads

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
        for name in ("real", "context", "ends", "kept_tokens", "kept_heads", "votes", "sizes"):
            tensor = getattr(self, name)  # layers may be on several devices
            setattr(self, name, None if tensor is None else tensor.to(inputs.query.device))
        return self._attend_in_context(layer, inputs, mask).transpose(1, 2)

    @abstractmethod
    def _attend_in_context(self, layer: CascadeLayer, inputs: AttentionInputs, mask: Tensor) -> Tensor:
        """Attend in a call with tokens of the context, and sum up importance; returns ``[B, H, T, D]``."""

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

    def _masked_attention(self, inputs: AttentionInputs, mask: Tensor, heads: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend with a mask ``[B, T, S]`` and with the heads of a bool ``[B, H, T or 1]``.

        Returns:
            Outputs ``[B, H, T, D]`` and weights ``[B, H, T, S]``, zero for heads that are not kept.
        """
        key = repeat_kv(inputs.key, inputs.query.shape[1])
        query, value, share = inputs.query, inputs.value, self.cache.rule.values
        out, weights = attend_top_values(query, key, value, mask, inputs.scaling, share, inputs.softcap)
        if heads is None:
            return out, weights
        return out * heads[..., None], weights * heads[..., None]


@dataclass
class GlobalPass(CascadePass):
    """One choice for the whole sequence (Algorithm 1).

    With C_l the tokens of the context that layer ``l`` keeps,

        s_t[j] = sum over layers l' < l, kept heads h, tokens i in C_l' of A_{l',h}[i, j],
        s_h[h] = sum over l' < l, i in C_l' of |y_{l',h}[i]|_1,

    layer ``l`` keeps the top tokens of C_{l-1} by ``s_t``, always the context's last one, and the top heads of those in
    layer ``l - 1`` by ``s_h``. Text after the context sees the same tokens and has the same heads.

    The context is whole in this call. Shapes: ``kept_tokens`` and ``votes`` are ``[B, T]``, ``kept_heads`` and
    ``sizes`` ``[B, H]``.
    """

    def _attend_in_context(self, layer: CascadeLayer, inputs: AttentionInputs, mask: Tensor) -> Tensor:
        rule, index = self.cache.rule, inputs.layer_idx
        # Prune by the importance from the layers before.
        if rule.tokens[index] < 1:
            self._choose_tokens(rule.tokens[index])
        if rule.heads[index] < inputs.query.shape[1]:
            self._choose_heads(rule.heads[index])
        layer.kept_tokens, layer.kept_heads = self.kept_tokens, self.kept_heads
        if self.kept_tokens is not None:
            mask = mask & self.kept_tokens[:, None]
        heads = None if self.kept_heads is None else self.kept_heads[..., None]
        out, weights = self._masked_attention(inputs, mask, heads)
        # Sum the importance over the tokens of the context that are left.
        voters = self.context if self.kept_tokens is None else self.context & self.kept_tokens
        votes = (weights.float().sum(1) * voters[..., None]).sum(1)
        sizes = (out.float().abs().sum(-1) * voters[:, None]).sum(-1)
        self.votes = votes if self.votes is None else self.votes + votes
        self.sizes = sizes if self.sizes is None else self.sizes + sizes
        return out

    def _choose_tokens(self, share: float) -> None:
        """Keep a share of the context's tokens, and everything after it."""
        assert self.votes is not None  # the first layer keeps all
        left = self.context if self.kept_tokens is None else self.context & self.kept_tokens
        last = torch.arange(left.shape[1], device=left.device) == self.ends[:, None]
        kept = keep_top(self.votes, left, share_of(self.context.sum(1), share), always=last)
        self.kept_tokens = kept | (self.real & ~self.context)

    def _choose_heads(self, count: int) -> None:
        """Keep the ``count`` heads of the largest accumulated magnitude (Section III-B)."""
        assert self.sizes is not None
        left = torch.ones_like(self.sizes, dtype=torch.bool) if self.kept_heads is None else self.kept_heads
        self.kept_heads = keep_top(self.sizes, left, torch.full_like(self.ends, count))


@dataclass
class PerRowPass(CascadePass):
    """A choice for each token.

    With ``S_l[i, j]`` the attention that token ``j`` was given by the tokens up to ``i``, and ``G_l[i, h]`` the
    magnitude of head ``h``'s outputs there,

        S_l[i, j] = sum over l' <= l, i' <= i, heads h of A_{l',h}[i', j],
        G_l[i, h] = sum over l' <= l, i' <= i of |y_{l',h}[i']|_1.

    In layer ``l`` a token ``i`` of the context sees the top tokens by ``S_{l-1}[i]`` among those that it saw in the
    layer before, itself always among them, and has the top heads by ``G_{l-1}[i]`` among those that it had there. So no
    token depends on a later one, and every token goes through all layers. What the last token of the context sees and
    has, all text after it sees of the context and has.

    The context may come in several calls. Shapes: ``kept_tokens`` and ``votes`` are ``[B, T, S]``, ``kept_heads`` and
    ``sizes`` ``[B, T, H]``.
    """

    def _attend_in_context(self, layer: CascadeLayer, inputs: AttentionInputs, mask: Tensor) -> Tensor:
        rule = self.cache.rule
        # Prune by the importance from the layers before.
        visible = self._choose_tokens(layer, rule.tokens[inputs.layer_idx], mask)
        heads = self._choose_heads(layer, rule.heads[inputs.layer_idx], inputs.query.shape[1])
        out, weights = self._masked_attention(inputs, visible, None if heads is None else heads.transpose(1, 2))
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
        itself = torch.eye(kv_len, dtype=torch.bool, device=mask.device)[kv_len - q_len :].expand_as(mask)
        candidates = mask if self.kept_tokens is None else mask & self.kept_tokens
        kept = keep_top(self.votes, candidates, share_of(mask.sum(-1), share), always=itself)
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


def keep_top(scores: Tensor, candidates: Tensor, count: Tensor, always: Tensor | None = None) -> Tensor:
    """Return bool ``[..., N]``: the ``count`` (``[...]``) candidates of the largest scores, ties by lowest index.

    Candidates in ``always`` (bool ``[..., N]``) come first, whatever their score. Scores are finite, and equal if they
    differ by rounding: heads that read the same value head have the same output for the first token, for instance.
    """
    largest = scores.masked_fill(~candidates, 0).abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scores = (scores / largest * 2**16).round()
    if always is not None:
        scores = scores.masked_fill(always, torch.inf)
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
