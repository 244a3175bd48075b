"""Distances between heads: the cost of using the attention of head r in place of that of head h.

Each metric takes attention ``weights [..., H, T, S]`` and returns ``cost [..., H, H]`` in fp32, with the cost of head h
with representative r at ``[h, r]``, summed over the T query tokens. Costs of blocks of query tokens add up to those of
all tokens, except for ``cosine``. With ``A_h`` the attention of a head:

    attention       |A_r - A_h|^2                                   the paper's, Section 3.3
    cosine          1 - <A_r, A_h> / |A_r| |A_h|                    the authors' release
    jensen_shannon  sum_t JS(A_r[t], A_h[t])                        rows as distributions over tokens
    sink_removed    |B_r - B_h|^2, B_h: A_h without its first column, rows scaled to a sum of 1
    output          |(A_r - A_h) V_h W_O,h|^2                       error of the layer's output

In many models the first token takes half of the attention (an attention sink), whatever else the head attends to, and
errors of the attention matter only as far as they change the output. All metrics but ``output`` are symmetric and are
squared distances of points, so that K-means applies to them; ``output`` is neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Metric = Literal["attention", "cosine", "jensen_shannon", "sink_removed", "output"]
METRICS: tuple[Metric, ...] = get_args(Metric)
#: Metrics whose costs are squared distances of points, which have means.
EUCLIDEAN = tuple(metric for metric in METRICS if metric != "output")


def attention(weights: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Compute ``|A_r - A_h|^2``."""
    return squared_distances(weights.float().flatten(-2))


def cosine(weights: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Compute ``1 - cos(A_r, A_h)``, half of the squared distance of vectors of length 1."""
    points = weights.float().flatten(-2)
    return squared_distances(points / torch.linalg.vector_norm(points, dim=-1, keepdim=True)) / 2


def jensen_shannon(weights: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Compute the Jensen-Shannon divergence of two heads' attention in nats, summed over the query tokens."""
    weights = weights.float()
    own = torch.special.entr(weights).sum((-2, -1))
    rows = []
    for head in range(weights.shape[-3]):
        mean = (weights + weights[..., head : head + 1, :, :]) / 2
        rows.append(torch.special.entr(mean).sum((-2, -1)) - (own + own[..., head : head + 1]) / 2)
    return torch.stack(rows, -2).clamp(min=0)


def sink_removed(weights: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Compute ``|B_r - B_h|^2``, with ``B_h[t, s] = A_h[t, s] / (1 - A_h[t, 0])`` for ``s > 0``."""
    rest = weights.float()[..., 1:]
    return squared_distances((rest / rest.sum(-1, keepdim=True).clamp(min=1e-6)).flatten(-2))


def output(weights: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Compute ``|(A_r - A_h) V_h W_O,h|^2`` from outputs ``[..., H, S, D]``, which are ``V_h F_h``.

    ``F_h F_h^T = W_O,h W_O,h^T`` (:func:`output_factors`), so that ``|x F_h| = |x W_O,h|``.
    """
    assert outputs is not None
    weights, rows = weights.float(), []
    for head in range(weights.shape[-3]):
        values = weights @ outputs[..., head : head + 1, :, :].float()  # A_r V_h F_h for all r: [..., H, T, D]
        error = values - values[..., head : head + 1, :, :]
        rows.append(error.square().sum((-2, -1)))
    return torch.stack(rows, -2)


def output_errors(weights: Tensor, outputs: Tensor) -> Tensor:
    """Return the vectors ``(A_r - A_h) V_h W_O,h`` of each pair, ``[..., H * H, T, width]``, with r running fastest.

    Here outputs ``[..., H, S, width]`` are ``V_h W_O,h`` themselves, since errors of two heads are added.
    """
    pairs = []
    for head in range(weights.shape[-3]):
        values = weights @ outputs[..., head : head + 1, :, :]
        pairs.append(values - values[..., head : head + 1, :, :])
    return torch.cat(pairs, -3)


METRIC_FUNCTIONS: dict[Metric, Callable[[Tensor, Tensor | None], Tensor]] = {
    "attention": attention,
    "cosine": cosine,
    "jensen_shannon": jensen_shannon,
    "sink_removed": sink_removed,
    "output": output,
}


def head_costs(metric: Metric, weights: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Compute the costs ``[..., H, H]`` of a metric; see the module."""
    return METRIC_FUNCTIONS[metric](weights, outputs)


def output_factors(weight: Tensor, num_heads: int) -> Tensor:
    """Return ``F_h [H, D, D]`` with ``F_h F_h^T = W_O,h W_O,h^T`` for the output projection's weight ``[d, H * D]``.

    The error of the layer's output is then measured with D instead of d numbers for each token.
    """
    exact = weight.cpu() if weight.device.type == "mps" else weight  # which has no fp64
    blocks = exact.double().unflatten(1, (num_heads, -1)).permute(1, 2, 0)  # W_O,h: [H, D, d]
    values, vectors = torch.linalg.eigh(blocks @ blocks.transpose(1, 2))
    return (vectors * values.clamp(min=0).sqrt()[:, None]).float().to(weight.device)


def squared_distances(points: Tensor, *, in_place: bool = False) -> Tensor:
    """Compute squared distances ``[..., H, H]`` between points ``[..., H, F]`` by a product.

    ``in_place`` allows to overwrite the points.
    """
    mean = points.mean(-2, keepdim=True)  # products of near points would cancel otherwise
    points = points.sub_(mean) if in_place else points - mean
    products = points @ points.transpose(-1, -2)
    squares = products.diagonal(dim1=-2, dim2=-1)
    return (squares[..., :, None] + squares[..., None, :] - 2 * products).clamp(min=0)
