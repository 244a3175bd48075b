"""Falcon, whose attention does not call the function that is registered with transformers: make it do so."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from chai.patching.devices import replaced_forward


@contextmanager
def dispatched_falcon(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let every attention of a Falcon model with rotary embeddings call the function ``name`` inside the block."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FalconAttention):
                forward = functools.partial(_forward, module, name)
                stack.enter_context(replaced_forward(module, forward, inside=True))
        yield


def _forward(
    module: FalconAttention,
    name: str,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Cache | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute what ``FalconAttention.forward`` computes, in the order of the other families; arguments as there."""
    assert alibi is None and position_embeddings is not None
    heads = module._split_heads(module.query_key_value(hidden_states))  # [B, T, H, D]; one KV head, or H
    query, key, value = (states.transpose(1, 2) for states in heads)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    attention = ALL_ATTENTION_FUNCTIONS[name]
    out, weights = attention(module, query, key, value, attention_mask, scaling=module.inv_norm_factor)
    return module.dense(out.flatten(2)), weights
