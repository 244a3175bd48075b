"""What attention, layers and models cost by arithmetic, and so the most that clustering can gain.

Prefill is counted in floating-point operations, two for each multiplication with its addition; decoding in bytes read
from memory: weights, keys and values. Norms, activation functions and softmax are left out of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a decoder layer that its cost depends on.

    Attributes:
        heads: H, query heads.
        key_heads: key and value heads.
        size: D, of a head.
        query_weights: entries of W_Q; 0 where it is fused with others and can't be sliced.
        key_weights: entries of W_K, likewise.
        other_weights: entries of all the layer's other matrices, which follow.
        value_weights: of those, entries of W_V; 0 where it is fused with others.
        output_weights: likewise of W_O.
        mlp_weights: likewise of the MLP.
        shares_values: a representative's values stand for its members' (CHAI-QKV).
    """

    heads: int
    key_heads: int
    size: int
    query_weights: int
    key_weights: int
    other_weights: int
    value_weights: int
    output_weights: int
    mlp_weights: int
    shares_values: bool = False

    def kept_keys(self, k: int) -> int:
        """Fewest key heads that ``k`` representatives can read."""
        return -(-k * self.key_heads // self.heads)

    def weights(self, k: int) -> int:
        """Entries of the matrices that are needed with ``k`` representatives."""
        query = self.query_weights * k // self.heads
        kept = self.key_weights + (self.value_weights if self.shares_values else 0)
        freed = kept - kept * self.kept_keys(k) // self.key_heads
        return query + self.key_weights + self.other_weights - freed

    def attention_flops(self, tokens: int, k: int) -> int:
        """Q K^T for ``k`` heads and A V for all (or as many), over a causal prompt."""
        pairs = tokens * (tokens + 1) // 2
        return 2 * self.size * pairs * (k + (k if self.shares_values else self.heads))

    def prefill_flops(self, tokens: int, k: int) -> int:
        """A layer over a prompt."""
        return 2 * tokens * self.weights(k) + self.attention_flops(tokens, k)

    def cache_entries(self, tokens: int, k: int) -> int:
        """Keys and values of a sequence: those of the kept key heads, and of all value heads (paper, section 3.5)."""
        kept = self.kept_keys(k)
        return tokens * self.size * (kept + (kept if self.shares_values else self.key_heads))

    def decode_entries(self, tokens: int, k: int) -> int:
        """Weights, keys and values read for one token."""
        return self.weights(k) + self.cache_entries(tokens, k)


def layer_shape(model: PreTrainedModel, shares_values: bool = False) -> LayerShape:
    """The shape of a model's decoder layers, which are taken to be alike."""
    config = model.config
    heads = config.num_attention_heads
    layer = next(module for module in model.modules() if hasattr(module, "self_attn") or hasattr(module, "attention"))
    attention = cast(nn.Module, getattr(layer, "self_attn", None) or layer.attention)

    def entries(part: nn.Module) -> int:
        return sum(module.weight.numel() for module in part.modules() if isinstance(module, nn.Linear))

    def weights(*names: str) -> int:
        found = (getattr(attention, name, None) for name in names)
        return sum(entries(module) for module in found if isinstance(module, nn.Linear))

    total, query_weights, key_weights = entries(layer), weights("q_proj"), weights("k_proj")
    return LayerShape(
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        query_weights=query_weights,
        key_weights=key_weights,
        other_weights=total - query_weights - key_weights,
        value_weights=weights("v_proj"),
        output_weights=weights("o_proj", "out_proj", "dense"),
        mlp_weights=total - entries(attention),
        shares_values=shares_values,
    )


def head_weights(model: PreTrainedModel) -> int:
    """Entries of the matrix that turns hidden states into logits."""
    output = model.get_output_embeddings()
    return output.weight.numel() if isinstance(output, nn.Linear) else 0


def model_prefill_flops(model: PreTrainedModel, tokens: int, counts: Sequence[int], shares_values: bool = False) -> int:
    """Time to first token in operations: a prompt through all layers, logits of its last token."""
    shape = layer_shape(model, shares_values)
    return sum(shape.prefill_flops(tokens, k) for k in counts) + 2 * head_weights(model)


def model_decode_entries(
    model: PreTrainedModel, tokens: int, counts: Sequence[int], shares_values: bool = False
) -> int:
    """Time to next token in entries read."""
    shape = layer_shape(model, shares_values)
    return sum(shape.decode_entries(tokens, k) for k in counts) + head_weights(model)
