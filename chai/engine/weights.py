"""The weights of a decoder layer, those that are multiplied with the same input side by side in one buffer.

The parameters of the model become views of the buffers, so that nothing is stored twice, until :meth:`restore`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Query, key and value, ``[B, T, heads, D]`` each.
Projected = tuple[Tensor, Tensor, Tensor]


class FusedLinear:
    """Several linear modules with the same input in one buffer of rows, with room for further rows."""

    def __init__(self, linears: list[nn.Linear], room: int = 0) -> None:
        self._linears, self._bounds = linears, [0]
        for linear in linears:
            self._bounds.append(self._bounds[-1] + linear.out_features)
        first = linears[0].weight.detach()
        rows = self._bounds[-1] + room
        #: ``[rows, width]``
        self.weight = first.new_empty(rows, first.shape[1])
        #: ``[rows]``, or ``None`` if no module has one
        self.bias = first.new_zeros(rows) if any(linear.bias is not None for linear in linears) else None
        for linear, begin, end in zip(linears, self._bounds, self._bounds[1:], strict=False):
            self.weight[begin:end] = linear.weight.detach()
            linear.weight.data = self.weight[begin:end]
            if linear.bias is not None and self.bias is not None:
                self.bias[begin:end] = linear.bias.detach()
                linear.bias.data = self.bias[begin:end]

    def restore(self) -> None:
        """Give the modules' parameters storage of their own again, those that are still views of the buffers."""
        for linear in self._linears:
            for parameter, buffer in ((linear.weight, self.weight), (linear.bias, self.bias)):
                if parameter is not None and buffer is not None and _same_storage(parameter, buffer):
                    parameter.data = parameter.data.clone()

    def product(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Multiply with some rows, ``[..., width]`` to ``[..., rows]``."""
        return functional.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])


class LayerWeights:
    """The weights of one decoder layer.

    The rows of ``projections`` are ``[Q; K; V; G]``: those of the model's projections, one head after the other, and
    room for the gathered rows of a clustered layer, of Q of the representatives, K of the stored KV heads and, if
    values are shared, V of the stored KV heads. So all heads are projected by one product with ``[Q; K; V]``, and the
    heads that a clustered layer reads by one with ``[V; G]``, or ``G``.
    """

    def __init__(self, layer: Any, k: int = 0, stored: int = 0, shares_values: bool = False) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        size = self.head_dim = attention.head_dim
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = [linear.out_features // size for linear in linears]  # H, H_kv, H_kv
        self.gathered = [k, stored, stored if shares_values else 0]
        self.projections: FusedLinear | None = None
        self.gate_up: FusedLinear | None = None
        try:
            self.projections = FusedLinear(linears, sum(self.gathered) * size)
            self.gate_up = FusedLinear([mlp.gate_proj, mlp.up_proj])
        except BaseException:  # most often there is no memory left
            self.restore()
            raise
        self.output, self.down = attention.o_proj, mlp.down_proj
        self.input_norm, self.attention_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.query_norm, self.key_norm = (
            getattr(getattr(attention, f"{one}_norm", None), "weight", None) for one in "qk"
        )

    def restore(self) -> None:
        """Give the model's parameters storage of their own again, and drop each buffer at once."""
        if self.projections is not None:
            self.projections.restore()
            self.projections = None
        if self.gate_up is not None:
            self.gate_up.restore()
            self.gate_up = None

    def project_all(self, x: Tensor) -> Projected:
        """Project all heads: ``[B, T, width]`` to ``[B, T, H, D]`` and twice ``[B, T, H_kv, D]``."""
        assert self.projections is not None
        product = self.projections.product(x, slice(0, sum(self.heads) * self.head_dim))
        query, key, value = product.unflatten(-1, (-1, self.head_dim)).split(self.heads, 2)
        return query, key, value

    def project_gathered(self, x: Tensor) -> Projected:
        """Project the gathered heads: ``[B, T, k, D]``, ``[B, T, n, D]``, and all values or ``[B, T, n, D]``."""
        assert self.projections is not None
        k, stored, shared = self.gathered
        begin = sum(self.heads[: 3 if shared else 2]) * self.head_dim
        product = self.projections.product(x, slice(begin, None)).unflatten(-1, (-1, self.head_dim))
        if shared:
            query, key, value = product.split([k, stored, shared], 2)
        else:
            value, query, key = product.split([self.heads[2], k, stored], 2)
        return query, key, value

    def project_rows(self, x: Tensor, representatives: Tensor, stored: Tensor) -> Projected:
        """Project the heads of each row, long ``[B, k]`` and ``[B, n]``: results as :meth:`project_gathered`."""
        assert self.projections is not None
        fused, (num_heads, num_kv_heads, _) = self.projections, self.heads
        heads = [representatives, stored + num_heads]
        if self.gathered[2]:
            heads.append(stored + num_heads + num_kv_heads)
        taken = torch.cat(heads, 1)  # [B, heads to take], among all heads of the buffer
        weight = fused.weight.unflatten(0, (-1, self.head_dim))[taken].flatten(1, 2)  # [B, rows, width]
        product = torch.bmm(x, weight.transpose(1, 2))
        if fused.bias is not None:
            product += fused.bias.unflatten(0, (-1, self.head_dim))[taken].flatten(1)[:, None]
        parts = product.unflatten(-1, (-1, self.head_dim)).split([part.shape[1] for part in heads], 2)
        if self.gathered[2]:
            query, key, value = parts
            return query, key, value
        begin = (num_heads + num_kv_heads) * self.head_dim
        value = fused.product(x, slice(begin, begin + num_kv_heads * self.head_dim))
        return parts[0], parts[1], value.unflatten(-1, (-1, self.head_dim))

    def gather(self, representatives: Tensor, stored: Tensor) -> None:
        """Copy the rows of representatives (long ``[k]``) and stored KV heads (long ``[n]``) into G."""
        assert self.projections is not None
        first, end = 0, sum(self.heads)
        for heads, count, taken in zip(self.heads, self.gathered, (representatives, stored, stored), strict=True):
            if count:
                for buffer in (self.projections.weight, self.projections.bias):
                    if buffer is not None:
                        rows = buffer.view(buffer.shape[0] // self.head_dim, -1)
                        torch.index_select(rows[first : first + heads], 0, taken, out=rows[end : end + count])
            first, end = first + heads, end + count

    def attention_output(self, heads: Tensor) -> Tensor:
        """Multiply the outputs of all heads with W_O, ``[B, T, H * D]`` to ``[B, T, width]``."""
        return functional.linear(heads, self.output.weight, self.output.bias)

    def mlp_output(self, neurons: Tensor) -> Tensor:
        """Multiply the neurons with the MLP's last matrix."""
        return functional.linear(neurons, self.down.weight, self.down.bias)


def _same_storage(parameter: Tensor, buffer: Tensor) -> bool:
    return parameter.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
