"""The slow oracle: clustered head attention written from the paper's equations, one head and one query at a time.

It runs inside a model in fp64 under an attention name of its own and shares no code with ``chai`` but the switch to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from chai.patching.apply import switched_attention

NAME = "oracle_heads"
#: layer -> (assignment [B, H], representatives [B, k]) or None for multi-head attention; the first real tokens
_STATE: dict[str, object] = {}


def attend_one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    additive: Tensor,
    sources: Tensor,
    tokens: int,
    shared_values: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """``[B, H, T, D]``; ``sources[b, h]`` is the head whose scores head ``h`` uses after ``tokens`` real tokens.

    With ``shared_values`` it uses that head's values too.
    """
    rows, heads, count, _ = query.shape
    length = key.shape[2]
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    lowest = torch.finfo(additive.dtype).min
    for b in range(rows):
        seen = [s for s in range(length) if bool((additive[b, 0, :, s] > lowest / 2).any())]
        start = seen[0] if seen else length
        for t in range(count):
            position = length - count + t
            for h in range(heads):
                source = h if position - start < tokens else int(sources[b, h])
                q = query[b, source, t].double()
                k = key[b, source * key.shape[1] // heads].double()
                scores = torch.stack([scaling * torch.dot(q, k[s]) for s in range(length)])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(scores + additive[b, 0, t].double(), 0)
                reader = source if shared_values else h
                out[b, h, t] = weights @ value[b, reader * value.shape[1] // heads].double()
    return out


def _forward(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    memberships, tokens = _STATE["memberships"], _STATE["tokens"]
    membership = memberships[module.layer_idx]
    rows, heads = query.shape[:2]
    sources = torch.arange(heads).expand(rows, -1)
    if membership is not None:
        assignment, representatives = membership
        sources = torch.stack([representatives[b][assignment[b]] for b in range(rows)])
    shared = bool(_STATE["shared_values"])
    out = attend_one_by_one(query, key, value, scaling, attention_mask, sources, tokens, shared, softcap)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


@contextmanager
def oracle(
    model: PreTrainedModel, memberships: list, tokens: int, shared_values: bool = False
) -> Iterator[PreTrainedModel]:
    """Run ``model`` with the oracle and the given membership of each layer; meant for calls without a cache."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, eager_mask)
    _STATE.update(memberships=memberships, tokens=tokens, shared_values=shared_values)
    try:
        with switched_attention(model, NAME):
            yield model
    finally:
        _STATE.clear()
