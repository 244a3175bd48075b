"""Arithmetic of attention, layers and models: operations of a prompt, bytes of a decode step.

Prefill is counted in floating-point operations, two per multiply-add; decoding in entries read from memory: weights,
keys and values. Left out of both: norms, activation functions, softmax, rotary embeddings, biases, and choosing by
comparison (K-means of the warm-up tokens, sorting by importance).

By its algorithm (paper, Figure 1), in a layer of hidden size d with H heads of head_dim D, a method projects and scores
a = ``scores`` heads, projects and averages the values of v = ``values``, and multiplies o = ``outputs`` with W_O, over
t of the T tokens:

    2 t (a d D + a' d D + v' d D + o D d + f M + P)      W_Q, W_K, W_V, W_O, MLP of M entries, predictor of P
    + 2 D (a + r v) s t (t + 1) / 2                      Q K^T and A V, causal

with a', v' the KV heads that a and v heads need (a' = a without grouped queries; all where later tokens may need other
heads), f the share of the neurons, s that of the tokens up to a token that it sees, and r that of their values, both
rounded up for each token. Warm-up tokens count with all heads. What an implementation really skips is each method's
``saving``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a decoder layer that its cost depends on."""

    num_heads: int  # query heads, H
    num_kv_heads: int  # KV heads
    head_dim: int  # D
    query_weights: int  # entries of W_Q; 0 if it is fused with others and cannot be sliced
    key_weights: int  # entries of W_K; 0 if fused
    other_weights: int  # entries of all other matrices of the layer, of which:
    value_weights: int  # W_V; 0 if fused
    output_weights: int  # W_O
    mlp_weights: int  # the MLP
    shares_values: bool = False  # members use the values of their representative (CHAI-QKV)

    def kv_heads_read(self, k: int) -> int:
        """Fewest KV heads that ``k`` representatives can read."""
        return -(-k * self.num_kv_heads // self.num_heads)

    def weights(self, k: int) -> int:
        """Entries of the matrices needed with ``k`` representatives."""
        values = k if self.shares_values else self.num_heads
        return _weights(self, LayerFlops(k, values, self.num_heads))

    def attention_flops(self, q_len: int, k: int) -> int:
        """Operations of Q K^T for ``k`` heads and A V for all (``k`` if values are shared), over a causal prompt."""
        pairs = q_len * (q_len + 1) // 2
        return 2 * self.head_dim * pairs * (k + (k if self.shares_values else self.num_heads))

    def prefill_flops(self, q_len: int, k: int) -> int:
        """Operations of a layer over a prompt."""
        return 2 * q_len * self.weights(k) + self.attention_flops(q_len, k)

    def cache_entries(self, kv_len: int, k: int) -> int:
        """Entries of one sequence: keys of the KV heads read, values of all (of those read if values are shared)."""
        read = self.kv_heads_read(k)
        return kv_len * self.head_dim * (read + (read if self.shares_values else self.num_kv_heads))


@dataclass(frozen=True)
class LayerFlops:
    """What a method computes in a layer over a prompt."""

    scores: int  # query heads that are projected, with the keys they read, and scored
    values: int  # heads whose values are projected and averaged
    outputs: int  # heads that W_O reads
    warmup_tokens: int = 0  # warm-up tokens, which run with all heads
    tokens: float = 1.0  # share of the tokens present, in every part of the layer
    projected: int = 0  # heads whose keys and values are projected, if they are more than those scored and averaged
    seen: float = 1.0  # share of the tokens up to a token that it scores
    read: float = 1.0  # share of the values of these that a head averages for a token
    neurons: float = 1.0  # share of the MLP's neurons
    predictor: int = 0  # entries of the predictor's matrices


def prompt_flops(shape: LayerShape, layers: Sequence[LayerFlops], q_len: int) -> int:
    """Count the operations of all layers over a prompt of ``q_len`` tokens; the equation is the module's."""
    return sum(_layer_flops(shape, layer, q_len) for layer in layers)


def share_of(count: int, share: float) -> int:
    """Return ``share`` of a count, rounded up, at least 1."""
    return max(1, -int(-(count * share - 1e-9) // 1))


def _layer_flops(shape: LayerShape, layer: LayerFlops, q_len: int) -> int:
    present = share_of(q_len, layer.tokens)
    warmup = min(layer.warmup_tokens, present)
    all_heads = LayerFlops(shape.num_heads, shape.num_heads, shape.num_heads)
    weights = warmup * _weights(shape, all_heads) + (present - warmup) * _weights(shape, layer)
    weights += present * layer.predictor
    scored = _pairs(warmup) * shape.num_heads
    scored += (_pairs(present, layer.seen) - _pairs(warmup, layer.seen)) * layer.scores
    averaged = _pairs(warmup) * shape.num_heads
    averaged += (_pairs(present, layer.seen, layer.read) - _pairs(warmup, layer.seen, layer.read)) * layer.values
    return 2 * weights + 2 * shape.head_dim * (scored + averaged)


def _weights(shape: LayerShape, layer: LayerFlops) -> int:
    """Count the entries that a token is multiplied with; a fused matrix of Q, K and V counts whole."""
    query = shape.query_weights * layer.scores // shape.num_heads
    key = shape.key_weights * shape.kv_heads_read(max(layer.scores, layer.projected)) // shape.num_kv_heads
    value = shape.value_weights * shape.kv_heads_read(max(layer.values, layer.projected)) // shape.num_kv_heads
    output = shape.output_weights * layer.outputs // shape.num_heads
    mlp = round(shape.mlp_weights * layer.neurons)
    fused = shape.other_weights - shape.value_weights - shape.output_weights - shape.mlp_weights
    return query + key + value + output + mlp + fused


def _pairs(tokens: int, seen: float = 1.0, read: float = 1.0) -> int:
    """Count the pairs of a token with a share of the tokens up to it, of which a share is read."""
    if seen == 1 and read == 1:
        return tokens * (tokens + 1) // 2
    return sum(share_of(share_of(place, seen), read) for place in range(1, tokens + 1))


def clustered_prompt_flops(shape: LayerShape, num_clusters: Sequence[int], q_len: int) -> int:
    """Count the operations of all layers over a prompt whose tokens all run with k heads in a layer."""
    return sum(shape.prefill_flops(q_len, k) for k in num_clusters)


def decode_entries(shape: LayerShape, num_clusters: Sequence[int], kv_len: int, batch_size: int) -> int:
    """Count the entries that a decode step reads: weights once, keys and values of every sequence."""
    weights = sum(shape.weights(k) for k in num_clusters)
    return weights + batch_size * sum(shape.cache_entries(kv_len, k) for k in num_clusters)
