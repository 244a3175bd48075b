"""Models in which one head attends exactly as another: clustering the two changes nothing but rounding."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tests.models import HEADS, make_model


def plant(model: PreTrainedModel) -> PreTrainedModel:
    """Give the last head of every layer the query and key weights of the head before it."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // HEADS
    groups = HEADS // (getattr(config, "num_key_value_heads", None) or HEADS)
    for layer in model.get_decoder().layers:
        attention = getattr(layer, "self_attn", None) or layer.attention
        with torch.no_grad():
            if hasattr(attention, "query_key_value"):  # [H, 3 (query, key, value), D] rows
                for tensor in attention.query_key_value.parameters():
                    heads = tensor.unflatten(0, (HEADS, 3, head_dim))
                    heads[-1, :2] = heads[-2, :2]
                continue
            projections = [attention.q_proj] + ([attention.k_proj] if groups == 1 else [])
            for projection in projections:
                for tensor in projection.parameters():
                    heads = tensor.unflatten(0, (-1, head_dim))
                    heads[-1] = heads[-2]
    return model


def planted_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a random fp32 model with a planted pair of heads in every layer."""
    return plant(make_model(family, seed))
