"""The projections to queries, keys and shared values, only for the heads that are read once the membership is known.

``W_Q`` has a block of rows for each head. A call whose rows (of the batch) all want the same heads multiplies by these
blocks as they lie in memory, neighbours together; nothing is copied, and nothing is stored beside the model's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import PreTrainedModel

from chai.cache import ClusteredCache, ClusteredLayer

#: Above this part of the heads one product with all of them is as fast.
WORTHWHILE = 0.8
#: What another product costs on its own, in multiply-adds that could be done in its time.
OVERHEAD = 2_000_000


@contextmanager
def sliced_projections(model: PreTrainedModel, active_cache: Callable[[], ClusteredCache | None]) -> Iterator[None]:
    """Replace the forward of every ``q_proj``, ``k_proj`` and ``v_proj`` inside the block.

    Layers whose projections aren't plain ``nn.Linear`` (quantised, with adapters, or fused into one) stay as they are:
    all heads are computed and the redundant ones dropped. Where accelerate has divided the model, its own wrapper
    stays outside: it brings the weights, of which rows are then taken.
    """
    from chai.devices import is_hooked
    from chai.runtime import replaced_forward

    with ExitStack() as stack:
        for module in model.modules():
            index = getattr(module, "layer_idx", None)
            found = {kind: getattr(module, f"{kind[0]}_proj", None) for kind in ("query", "key", "value")}
            if not isinstance(index, int) or not all(type(found[kind]) is nn.Linear for kind in ("query", "key")):
                continue
            # OPT cuts what it projects into a fixed number of heads; the others into as many as there are.
            fixed, size = hasattr(module, "num_heads"), cast(int, module.head_dim)
            for kind, linear in found.items():
                if type(linear) is not nn.Linear or ("forward" in linear.__dict__ and not is_hooked(linear)):
                    continue
                forward = _forward(linear, index, size, kind, fixed, active_cache)
                stack.enter_context(replaced_forward(linear, forward, inside=True))
        yield


def _forward(
    linear: nn.Linear,
    index: int,
    size: int,
    kind: str,
    fixed: bool,
    active_cache: Callable[[], ClusteredCache | None],
) -> Callable[[Tensor], Tensor]:
    """A projection's forward (to ``query``, ``key`` or ``value``): all heads, or those of the representatives."""
    total = linear.out_features // size

    def forward(hidden: Tensor) -> Tensor:
        cache = active_cache()
        layer = cache.layers[index] if cache is not None else None
        if not isinstance(layer, ClusteredLayer) or not layer.compacted or layer.plan is None:
            return functional.linear(hidden, linear.weight, linear.bias)
        if kind == "value" and not layer.shares_values:
            return functional.linear(hidden, linear.weight, linear.bias)
        wanted = layer.plan.representative_rows if kind == "query" else layer.plan.kept_rows
        choice = _choose(wanted, total, hidden.shape, size)
        if choice is None:
            return functional.linear(hidden, linear.weight, linear.bias)
        if len(choice) == len(wanted):
            parts = hidden.split(len(hidden) // len(wanted))
            found = torch.cat([project_heads(part, linear, own, size) for part, own in zip(parts, wanted, strict=True)])
        else:  # all rows' heads, of which each row then takes its own
            place = {head: i for i, head in enumerate(choice[0])}
            chosen = torch.tensor([[place[head] for head in own] for own in wanted], device=hidden.device)
            projected = project_heads(hidden, linear, choice[0], size).unflatten(2, (-1, size))
            found = projected.gather(2, chosen[:, None, :, None].expand(-1, hidden.shape[1], -1, size)).flatten(2)
        if not fixed:
            return found
        columns = torch.tensor(wanted, device=hidden.device)[:, None, :, None]
        all_heads = hidden.new_zeros(*hidden.shape[:2], total, size)
        columns = columns.expand(-1, hidden.shape[1], -1, size)
        return all_heads.scatter(2, columns, found.unflatten(2, (-1, size))).flatten(2)

    return forward


def _choose(wanted: list[list[int]], total: int, shape: torch.Size, size: int) -> list[list[int]] | None:
    """The heads to project, as one list for all rows or one for each row; ``None`` for all heads, where that is faster.

    Args:
        wanted: heads of each row, or one list that holds for all.
        total: heads that the matrix has.
        shape: of the hidden states, ``[B, T, d]``.
        size: of a head.
    """
    rows, count, width = shape
    union = sorted({head for own in wanted for head in own})
    choices = [wanted] if len(wanted) == 1 else [wanted, [union]]
    costs = []
    for choice in choices:
        products = sum(_runs(own) for own in choice)
        heads = sum(len(own) for own in choice) * (rows if len(choice) == 1 else 1)
        costs.append(heads * count * width * size + products * OVERHEAD)
    least = min(costs)
    if least > WORTHWHILE * (rows * total * count * width * size + OVERHEAD):
        return None
    return choices[costs.index(least)]


def _runs(heads: list[int]) -> int:
    """Stretches of neighbours among ascending heads."""
    return sum(1 for before, head in zip([-2, *heads], heads, strict=False) if head != before + 1)


def project_heads(hidden: Tensor, linear: nn.Linear, heads: list[int], size: int) -> Tensor:
    """``hidden`` times the rows of some heads: ``[..., d]`` to ``[..., len(heads) * size]``.

    Args:
        hidden: ``[..., d]``.
        linear: ``[H * size, d]``.
        heads: ascending; one may come twice.
        size: of a head.
    """
    parts, begin = [], 0
    for end in range(1, len(heads) + 1):
        if end == len(heads) or heads[end] != heads[end - 1] + 1:
            rows = slice(heads[begin] * size, (heads[end - 1] + 1) * size)
            bias = None if linear.bias is None else linear.bias[rows]
            parts.append(functional.linear(hidden, linear.weight[rows], bias))
            begin = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
