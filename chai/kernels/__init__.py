"""Fast paths of clustered head attention, and the choice between them. Each is tested against the slow reference."""

from __future__ import annotations

import torch
from torch import Tensor

from chai.kernels.dense import dense_attention
from chai.kernels.grouped import grouped_attention
from chai.kernels.plan import HeadPlan
from chai.kernels.stock import all_heads_attention as all_heads_attention
from chai.kernels.stock import shared_values_attention as shared_values_attention
from chai.kernels.stock import stock_attention

#: Queries up to which products over all heads beat a task for each cluster, on a CPU.
SHORT = 768
#: The same against torch's fused kernel on an accelerator, which needs many queries to be worth its scores.
FEW = 16


def attend(query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, scaling: float, mask: Tensor | None) -> Tensor:
    """Clustered attention by whatever is fastest for these shapes.

    Arguments and result as in :func:`chai.kernels.dense.dense_attention`.
    """
    on_cpu = query.device.type == "cpu"
    if query.shape[2] <= (SHORT if on_cpu else FEW) or (on_cpu and _needs_grad(query, key, value)):
        return dense_attention(query, key, value, plan, scaling, mask)
    if on_cpu:
        return grouped_attention(query, key, value, plan, scaling, mask)
    return stock_attention(query, key, value, plan, scaling, mask)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
