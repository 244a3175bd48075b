"""Fast paths of clustered head attention, and the choice between them. Each is tested against the slow reference."""

from __future__ import annotations

import torch
from torch import Tensor

from chai.kernels.dense import dense_attention
from chai.kernels.grouped import grouped_attention
from chai.kernels.plan import HeadPlan
from chai.kernels.stock import all_heads_attention as all_heads_attention
from chai.kernels.stock import stock_attention


def attend(query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, scaling: float, mask: Tensor | None) -> Tensor:
    """Clustered attention by whatever is fastest for these shapes.

    Arguments and result as in :func:`chai.kernels.dense.dense_attention`.
    """
    count, length = query.shape[2], value.shape[2]
    if count * length <= DENSE or _needs_grad(query, key, value):
        return dense_attention(query, key, value, plan, scaling, mask)
    if query.device.type == "cpu":
        return grouped_attention(query, key, value, plan, scaling, mask)
    return stock_attention(query, key, value, plan, scaling, mask)


#: Weights of a head, T * S, up to which handling all rows and heads at once beats handling each cluster by itself.
DENSE = 1 << 16


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
