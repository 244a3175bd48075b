"""Models in which one head of each layer attends like another: clustering the two must change nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chai.methods import Random
from chai.patching.model_info import find_blocks
from tests.models import HEADS, LAYERS, make_model

#: The clusters that join the two heads of each layer: a fixed choice, whatever the model.
PLANTED = Random(clusters=HEADS - 1).cluster_heads(
    range(LAYERS), [HEADS - 1] * LAYERS, *[torch.empty(LAYERS, 1, HEADS, 0, 1)] * 2, 1.0
)


def planted_model(family: str, *, values: bool) -> PreTrainedModel:
    """A small model of a family with planted heads."""
    return plant(make_model(family), values=values)


def plant(model: PreTrainedModel, *, values: bool) -> PreTrainedModel:
    """Give the planted heads of a model equal queries and keys, and equal values if ``values``; returns the model."""
    for block, clusters in zip(find_blocks(model), PLANTED, strict=True):
        sources = clusters.representatives[0][clusters.assignment[0]].tolist()
        for kind in "qkv" if values else "qk":
            for head, source in enumerate(sources):
                for own, other in zip(
                    *(rows(block.attention, model.config, kind, which) for which in (head, source)), strict=True
                ):
                    own.data.copy_(other.data.clone())
    return model


def rows(attention: nn.Module, config, kind: str, head: int) -> list[Tensor]:
    """Views of the weights that make ``kind`` (q, k or v) of one query head, ``[D, ...]`` each: matrix, bias, norm."""
    size = config.hidden_size // HEADS
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or HEADS
    group, place = HEADS // kv_heads, "qkv".index(kind)
    if hasattr(attention, "q_proj"):
        block, fused = head if kind == "q" else head // group, getattr(attention, f"{kind}_proj")
    elif hasattr(attention, "qkv_proj"):  # Phi-3: all of Q, all of K, all of V
        first = {"q": 0, "k": HEADS, "v": HEADS + kv_heads}[kind]
        block, fused = first + (head if kind == "q" else head // group), attention.qkv_proj
    elif hasattr(attention, "c_attn"):  # GPT-2, the same, transposed
        block, fused = HEADS * place + head, attention.c_attn
        return [fused.weight.unflatten(1, (-1, size))[:, block].T, fused.bias.unflatten(0, (-1, size))[block]]
    elif config.model_type == "gpt_neox":  # Q, K and V of each head
        block, fused = 3 * head + place, attention.query_key_value
    elif config.new_decoder_architecture:  # Falcon: Q of a group, its K and its V
        inside = {"q": head % group, "k": group, "v": group + 1}[kind]
        block, fused = head // group * (group + 2) + inside, attention.query_key_value
    else:  # Falcon with one KV head
        block, fused = {"q": head, "k": HEADS, "v": HEADS + 1}[kind], attention.query_key_value
    parameters = [parameter for parameter in (fused.weight, fused.bias) if parameter is not None]
    views = [parameter.unflatten(0, (-1, size))[block] for parameter in parameters]
    norm = getattr(attention, f"{kind}_layernorm", None)
    return views if norm is None else [*views, norm.norms[block].weight]  # StableLM: a norm of each head
