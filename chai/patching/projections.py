"""Project only the heads that are read: Q of the representatives, and the stored K (and V) heads.

``W_Q`` has a block of rows for each head. If all rows of the batch read the same heads, the hidden states are
multiplied by these blocks where they lie in memory, neighbouring blocks together. Nothing is copied, and nothing is
stored beside the weights of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import PreTrainedModel

from chai.cache.clustered import Clustered, ClusteredLayer
from chai.patching.devices import is_hooked, replaced_forward
from chai.patching.model_info import norms_all_heads

#: Above this share of the heads, one product with all of them is as fast.
WORTHWHILE = 0.8
#: Cost of one more product, in multiply-adds of the same time.
OVERHEAD = 2_000_000

#: Returns the cache layer of the running call by its index; ``None`` if no call is running.
LayerLookup = Callable[[int], Any]


@contextmanager
def sliced_projections(model: PreTrainedModel, cache_layer: LayerLookup) -> Iterator[None]:
    """Replace the forward of every ``q_proj``, ``k_proj`` and ``v_proj`` inside the block.

    Layers whose projections are not plain ``nn.Linear`` modules (quantized, with adapters, or fused) are left alone:
    all heads are computed there, and the redundant ones are dropped. So are queries and keys of models that normalise
    them over all heads together. Accelerate's wrapper stays outside of the
    replacement: it loads the weights before rows are taken from them.
    """
    with ExitStack() as stack:
        for module in model.modules():
            index = getattr(module, "layer_idx", None)
            linears = {kind: getattr(module, f"{kind[0]}_proj", None) for kind in ("query", "key", "value")}
            if not isinstance(index, int) or not all(type(linears[kind]) is nn.Linear for kind in ("query", "key")):
                continue
            # OPT reshapes the projection to a fixed number of heads, the other families infer the number.
            fixed_heads, head_dim = hasattr(module, "num_heads"), cast(int, module.head_dim)
            for kind, linear in linears.items():
                if kind != "value" and norms_all_heads(module):
                    continue
                if type(linear) is not nn.Linear or ("forward" in linear.__dict__ and not is_hooked(linear)):
                    continue
                forward = _projection(linear, index, head_dim, kind, fixed_heads, cache_layer)
                stack.enter_context(replaced_forward(linear, forward, inside=True))
        yield


def _projection(
    linear: nn.Linear, index: int, head_dim: int, kind: str, fixed_heads: bool, cache_layer: LayerLookup
) -> Callable[[Tensor], Tensor]:
    """Build the forward of a projection to ``query``, ``key`` or ``value``."""
    total = linear.out_features // head_dim

    def forward(hidden: Tensor) -> Tensor:
        layer = cache_layer(index)
        heads = None
        if isinstance(layer, ClusteredLayer) and isinstance(layer.phase, Clustered):
            head_map = layer.phase.head_map
            if kind == "query":
                heads, columns = head_map.representatives_by_row, head_map.clusters.representatives
            elif kind == "key" or layer.evicts_values:
                heads, columns = head_map.stored_by_row, head_map.stored
        plan = None if heads is None else _choose_products(heads, total, hidden.shape, head_dim)
        if heads is None or plan is None:
            return functional.linear(hidden, linear.weight, linear.bias)
        if len(plan) == len(heads):  # each row by itself, or all rows alike
            parts = hidden.split(len(hidden) // len(heads))
            outputs = [project_heads(part, linear, row, head_dim) for part, row in zip(parts, heads, strict=True)]
            projected = torch.cat(outputs)
        else:  # the heads of all rows, of which each row then takes its own
            place = {head: i for i, head in enumerate(plan[0])}
            own = torch.tensor([[place[head] for head in row] for row in heads], device=hidden.device)
            union = project_heads(hidden, linear, plan[0], head_dim).unflatten(2, (-1, head_dim))
            own = own[:, None, :, None].expand(-1, hidden.shape[1], -1, head_dim)
            projected = union.gather(2, own).flatten(2)
        if not fixed_heads:
            return projected
        # Scatter into zeros of all heads.
        columns = columns[:, None, :, None].expand(-1, hidden.shape[1], -1, head_dim)
        all_heads = hidden.new_zeros(*hidden.shape[:2], total, head_dim)
        return all_heads.scatter(2, columns, projected.unflatten(2, (-1, head_dim))).flatten(2)

    return forward


def _choose_products(heads: list[list[int]], total: int, shape: torch.Size, head_dim: int) -> list[list[int]] | None:
    """Choose which heads to project for hidden states of a shape ``[B, T, d]``: row by row, their union, or all.

    From the heads of each row (or a single list for all rows) and the total in the matrix to a list for each row, or a
    single one; ``None`` where projecting all heads is faster.
    """
    batch_size, q_len, width = shape
    union = sorted({head for row in heads for head in row})
    plans = [heads] if len(heads) == 1 else [heads, [union]]
    costs = []
    for plan in plans:
        products = sum(_count_runs(row) for row in plan)
        projected = sum(len(row) for row in plan) * (batch_size if len(plan) == 1 else 1)
        costs.append(projected * q_len * width * head_dim + products * OVERHEAD)
    least = min(costs)
    if least > WORTHWHILE * (batch_size * total * q_len * width * head_dim + OVERHEAD):
        return None
    return plans[costs.index(least)]


def _count_runs(heads: list[int]) -> int:
    """Count the runs of neighbours among ascending heads."""
    return sum(1 for before, head in zip([-2, *heads], heads, strict=False) if head != before + 1)


def project_heads(hidden: Tensor, linear: nn.Linear, heads: list[int], head_dim: int) -> Tensor:
    """Multiply hidden states by the weights of some heads: ``[..., d]`` to ``[..., len(heads) * head_dim]``.

    Heads are ascending; one may occur twice.
    """
    parts, begin = [], 0
    for end in range(1, len(heads) + 1):
        if end == len(heads) or heads[end] != heads[end - 1] + 1:  # one product per run of neighbours
            rows = slice(heads[begin] * head_dim, (heads[end - 1] + 1) * head_dim)
            bias = None if linear.bias is None else linear.bias[rows]
            parts.append(functional.linear(hidden, linear.weight[rows], bias))
            begin = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
