"""A forward pass in which each head attends with the query and the key of a chosen head, and with its own values.

With the map ``r(h)`` of a layer, computed for each row and possibly anew for later tokens,

    y_h[t] = softmax(scaling * q_r(h)[t] K_r(h)^T) V_h          (paper, Section 3.4)

No cache is kept and no attention matrix is built, so that any map can be measured on texts of thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chai.attention import causal_mask, mha_attention
from chai.heads import HeadClusters, repeat_kv, take_heads
from chai.patching.apply import AttentionInputs, ForwardPass


@dataclass(frozen=True)
class Segment:
    """The map of the query tokens from ``begin`` on, up to the next segment."""

    begin: int
    heads: Tensor  # long [B, H]: the head whose attention each head uses
    shared: Tensor | None = None  # bool [B, H]: heads that use the values of that head, too


#: Decides the map of a layer from its own inputs, which earlier layers have changed already, as in CHAI.
Choose = Callable[[AttentionInputs], Sequence[Segment]]


class MappedPass(ForwardPass):
    """One pass with the maps that ``choose`` returns.

    Attributes:
        choose: The maps of a layer.
        exact_tokens: First tokens, which run with their own heads.
        bits: Bits of keys and values (:func:`rounded`); ``None``: those of the model.
        kept: Of each layer that ran, the number of heads whose attention is computed, ``[B]``, of the last segment.
    """

    def __init__(self, choose: Choose, exact_tokens: int = 0, bits: int | None = None) -> None:
        self.choose, self.exact_tokens, self.bits = choose, exact_tokens, bits
        self.kept: dict[int, Tensor] = {}

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Compute one layer's attention, ``[B, T, H, D]``."""
        if self.bits is not None:
            inputs = replace(inputs, key=rounded(inputs.key, self.bits), value=rounded(inputs.value, self.bits))
        batch_size, num_heads, q_len, _ = inputs.query.shape
        own = torch.arange(num_heads, device=inputs.query.device).expand(batch_size, -1)
        segments = [Segment(0, own), *self.choose(inputs)]
        last = segments[-1].heads
        self.kept[inputs.layer_idx] = torch.tensor([len(row.unique()) for row in last])
        begins = [0, *(max(segment.begin, self.exact_tokens) for segment in segments[1:])]
        ends = [*begins[1:], q_len]
        parts = [
            _attend(inputs, segment, begin, min(end, q_len))
            for segment, begin, end in zip(segments, begins, ends, strict=True)
            if begin < min(end, q_len)
        ]
        return torch.cat(parts, 1)

    def mean_kept(self) -> Tensor:
        """Return the mean number of computed heads of the layers, ``[B]``."""
        return torch.stack(list(self.kept.values())).float().mean(0)


def _attend(inputs: AttentionInputs, segment: Segment, begin: int, end: int) -> Tensor:
    """Compute the attention of the query tokens from ``begin`` to ``end``, ``[B, end - begin, H, D]``."""
    heads = segment.heads
    group = inputs.query.shape[1] // inputs.key.shape[1]
    own = torch.arange(heads.shape[1], device=heads.device).expand_as(heads)
    of_values = own if segment.shared is None else torch.where(segment.shared, heads, own)
    query = take_heads(inputs.query[:, :, begin:end], heads)
    key = take_heads(inputs.key[:, :, :end], heads // group)
    value = take_heads(inputs.value[:, :, :end], of_values // group)
    mask = None if inputs.mask is None else inputs.mask[:, :, begin:end, :end]
    if mask is None and begin:
        mask = causal_mask(end - begin, end, query.device)
    return mha_attention(query, key, value, inputs.scaling, mask, softcap=inputs.softcap)


def head_of(clusters: HeadClusters) -> Tensor:
    """Return the representative of each head, long ``[B, H]``."""
    return clusters.representatives.gather(1, clusters.assignment)


def rounded(states: Tensor, bits: int) -> Tensor:
    """Round keys or values ``[B, H_kv, S, D]`` to ``2^bits`` levels between the least and the largest of each vector.

    That is what a cache with one scale and one offset for each token and KV head gives back.
    """
    low, high = states.aminmax(dim=-1, keepdim=True)
    step = (high - low).float().clamp(min=torch.finfo(torch.float32).tiny) / (2**bits - 1)
    return (low + ((states - low) / step).round() * step).to(states.dtype)


def shared_value_errors(inputs: AttentionInputs, heads: Tensor, tokens: int, factors: Tensor) -> Tensor:
    """Return what it costs each head in the first tokens to use its representative's values: ``[B, H]`` (fp32).

    |A_r (V_r - V_h) W_O,h|^2          with the factors F_h of :func:`chai.clustering.distances.output_factors`
    """
    num_heads = heads.shape[1]
    query, key = inputs.query[:, :, :tokens].float(), repeat_kv(inputs.key[:, :, :tokens].float(), num_heads)
    value = repeat_kv(inputs.value[:, :, :tokens].float(), num_heads)
    difference = (take_heads(value, heads) - value) @ factors.to(value.device)
    mask = causal_mask(tokens, tokens, query.device)
    out = mha_attention(take_heads(query, heads), take_heads(key, heads), difference, inputs.scaling, mask)
    return out.square().sum((1, 3))
