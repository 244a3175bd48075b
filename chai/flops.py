"""Operations of a method over a prompt, by its algorithm: what accuracy is set against in the paper's Figure 1.

For each layer with d = hidden size, H heads of size D, of which the method projects and scores a = ``scores``, projects
and averages the values of v = ``values``, and lets o = ``outputs`` into W_O, over t of the T tokens:

    2 t (a d D + a' d D + v' d D + o D d + f M + P)      W_Q, W_K, W_V, W_O, MLP of M entries, predictor of P
    + 2 D (a + r v) t (t + 1) / 2                        Q K^T and A V, causal

with a', v' the key and value heads that a and v heads need (a' = a without grouped queries), f the share of the neurons
and r of the values. Tokens before the membership is known count with all heads. The logits of the last token are added.
A multiplication with its addition is two operations. Left out, for all methods: norms, activation functions, softmax,
rotary embeddings, biases, and what chooses by comparing (K-means of the first tokens, sums and sorting of importance).

This is the count of the algorithm. What this implementation skips in fact is each method's ``saving``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from chai.costs import LayerShape, head_weights, layer_shape

if TYPE_CHECKING:
    from chai.methods.base import Method


@dataclass(frozen=True)
class LayerWork:
    """What a layer computes of a prompt.

    Attributes:
        scores: query heads that are projected, with the keys they read, and scored.
        values: heads whose values are projected and averaged.
        outputs: heads that W_O reads.
        first_tokens: tokens that run with all heads before that.
        tokens: share of the tokens that are there, in every part of the layer.
        read: share of the values that a head averages for a token.
        neurons: share of the MLP's neurons.
        predictor: entries of the matrices that decide for a token what of the above it gets.
    """

    scores: int
    values: int
    outputs: int
    first_tokens: int = 0
    tokens: float = 1.0
    read: float = 1.0
    neurons: float = 1.0
    predictor: int = 0


def all_heads(heads: int) -> LayerWork:
    """What multi-head attention computes."""
    return LayerWork(heads, heads, heads)


def method_flops(model: PreTrainedModel, method: Method, tokens: int) -> int:
    """Operations of a prompt under a method: all layers, and the logits of its last token.

    Args:
        model: whose shape counts; it may have fewer positions.
        method: its :meth:`~chai.methods.base.Method.work` counts.
        tokens: of the prompt.
    """
    shape = layer_shape(model)
    return sum(layer_flops(shape, work, tokens) for work in method.work(model.config)) + 2 * head_weights(model)


def layer_flops(shape: LayerShape, work: LayerWork, tokens: int) -> int:
    """Operations of a layer over a prompt of ``tokens``; the equation is the module's."""
    there = share_of(tokens, work.tokens)
    first = min(work.first_tokens, there)
    whole = all_heads(shape.heads)
    weights = first * _weights(shape, whole) + (there - first) * _weights(shape, work) + there * work.predictor
    scored = _pairs(first) * shape.heads + (_pairs(there) - _pairs(first)) * work.scores
    averaged = _pairs(first) * shape.heads + (_pairs(there, work.read) - _pairs(first, work.read)) * work.values
    return 2 * weights + 2 * shape.size * (scored + averaged)


def share_of(count: int, share: float) -> int:
    """``share`` of a count, rounded up, at least one (as :func:`chai.cascade.share_of` has it for tensors)."""
    return max(1, -int(-(count * share - 1e-9) // 1))


def _weights(shape: LayerShape, work: LayerWork) -> int:
    """Entries of the layer's matrices that a token is multiplied with; a matrix of Q, K and V in one counts whole."""
    query = shape.query_weights * work.scores // shape.heads
    key = shape.key_weights * shape.kept_keys(work.scores) // shape.key_heads
    value = shape.value_weights * shape.kept_keys(work.values) // shape.key_heads
    output = shape.output_weights * work.outputs // shape.heads
    mlp = round(shape.mlp_weights * work.neurons)
    fused = shape.other_weights - shape.value_weights - shape.output_weights - shape.mlp_weights
    return query + key + value + output + mlp + fused


def _pairs(tokens: int, share: float = 1.0) -> int:
    """Pairs of a token with those up to it, of which it takes a share."""
    if share == 1:
        return tokens * (tokens + 1) // 2
    return sum(share_of(seen, share) for seen in range(1, tokens + 1))
