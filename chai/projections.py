"""The projections to queries and keys, only for the heads that are read once the membership is known.

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
#: Tokens of a row from which each row of a batch gets products of its own, instead of sharing those of all rows' heads.
LONG = 32


@contextmanager
def sliced_projections(model: PreTrainedModel, active_cache: Callable[[], ClusteredCache | None]) -> Iterator[None]:
    """Replace the forward of every ``q_proj`` and ``k_proj`` inside the block.

    Layers whose projections aren't plain ``nn.Linear`` (quantised, with adapters, offloaded, or fused into one) stay as
    they are: all heads are computed and the redundant ones dropped.
    """
    from chai.runtime import replaced_forward

    with ExitStack() as stack:
        for module in model.modules():
            index = getattr(module, "layer_idx", None)
            both = [getattr(module, name, None) for name in ("q_proj", "k_proj")]
            if not isinstance(index, int) or not all(type(one) is nn.Linear for one in both):
                continue
            # OPT cuts what it projects into a fixed number of heads; the others into as many as there are.
            fixed, size = hasattr(module, "num_heads"), cast(int, module.head_dim)
            for linear, of_queries in zip(cast(list[nn.Linear], both), (True, False), strict=True):
                if "forward" in linear.__dict__:  # wrapped by another library (offloading)
                    continue
                forward = _forward(linear, index, size, of_queries, fixed, active_cache)
                stack.enter_context(replaced_forward(linear, forward))
        yield


def _forward(
    linear: nn.Linear,
    index: int,
    size: int,
    of_queries: bool,
    fixed: bool,
    active_cache: Callable[[], ClusteredCache | None],
) -> Callable[[Tensor], Tensor]:
    """A projection's forward: all heads, or those of the representatives."""
    total = linear.out_features // size

    def forward(hidden: Tensor) -> Tensor:
        cache = active_cache()
        layer = cache.layers[index] if cache is not None else None
        if not isinstance(layer, ClusteredLayer) or not layer.compacted or layer.plan is None:
            return functional.linear(hidden, linear.weight, linear.bias)
        wanted = layer.plan.representative_rows if of_queries else layer.plan.kept_rows
        heads = len(wanted[0])
        if heads > WORTHWHILE * total:
            return functional.linear(hidden, linear.weight, linear.bias)
        if len(wanted) == 1:
            found = project_heads(hidden, linear, wanted[0], size)
        elif hidden.shape[1] >= LONG:
            found = torch.cat([project_heads(hidden[row, None], linear, own, size) for row, own in enumerate(wanted)])
        else:
            union = sorted({head for own in wanted for head in own})
            if len(union) > WORTHWHILE * total:
                return functional.linear(hidden, linear.weight, linear.bias)
            place = {head: i for i, head in enumerate(union)}
            chosen = torch.tensor([[place[head] for head in own] for own in wanted], device=hidden.device)
            projected = project_heads(hidden, linear, union, size).unflatten(2, (-1, size))
            found = projected.gather(2, chosen[:, None, :, None].expand(-1, hidden.shape[1], -1, size)).flatten(2)
        if not fixed:
            return found
        columns = torch.tensor(wanted, device=hidden.device)[:, None, :, None]
        all_heads = hidden.new_zeros(*hidden.shape[:2], total, size)
        columns = columns.expand(-1, hidden.shape[1], -1, size)
        return all_heads.scatter(2, columns, found.unflatten(2, (-1, size))).flatten(2)

    return forward


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
