"""What attention, layers and models cost by arithmetic, and so the most that clustering can gain.

Prefill is counted in floating-point operations, two for each multiplication with its addition; decoding in bytes read
from memory: weights, keys and values. Norms, activation functions and softmax are left out of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        other_weights: entries of all the layer's other matrices.
        value_weights: entries of W_V, where values are shared; else they are among the others.
        shares_values: a representative's values stand for its members' (CHAI-QKV).
    """

    heads: int
    key_heads: int
    size: int
    query_weights: int
    key_weights: int
    other_weights: int
    value_weights: int = 0
    shares_values: bool = False

    def kept_keys(self, k: int) -> int:
        """Fewest key heads that ``k`` representatives can read."""
        return -(-k * self.key_heads // self.heads)

    def weights(self, k: int) -> int:
        """Entries of the matrices that are needed with ``k`` representatives."""
        query = self.query_weights * k // self.heads
        both = (self.key_weights + self.value_weights) * self.kept_keys(k) // self.key_heads
        return query + both + self.other_weights

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
    attention = getattr(layer, "self_attn", None) or layer.attention
    wanted = ("q_proj", "k_proj", "v_proj") if shares_values else ("q_proj", "k_proj")
    sliced = [getattr(attention, name, None) for name in wanted]
    total = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
    entries = [one.weight.numel() if isinstance(one, nn.Linear) else 0 for one in sliced]
    return LayerShape(
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        query_weights=entries[0],
        key_weights=entries[1],
        other_weights=total - sum(entries),
        value_weights=sum(entries[2:]),
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
