"""A lean forward pass that reads a model's weights, over static buffers."""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from chai.engine import attention, plain
from chai.engine.attention import Visible
from chai.engine.layers import Layer, count_stored
from chai.engine.support import read_shape
from chai.engine.weights import Projected
from chai.kernels import layer as kernel_operations
from chai.methods.base import Method
from chai.methods.clustering import ClusteringMethod
from chai.patching.model_info import find_layers


class Decoder:
    """The layers of a model under a method, with their cache and the buffers of a batch.

    Attributes:
        sequence: long ``[S + 1, B]``, prompt and generated tokens, place by place.
        token: long ``[B]``, the tokens that the next step runs.
        position: int32 ``[1]``, tokens in the cache: the place of ``token``.
        starts: int32 ``[B]``, padding tokens at the start of each row.
        logits: ``[B, V]``, of the token after the last one that ran.
    """

    def __init__(self, model: PreTrainedModel, method: Method, batch_size: int, capacity: int, kernels: bool) -> None:
        self.shape, self.kernels, self.batch_size, self.capacity = read_shape(model), kernels, batch_size, capacity
        self.operations: ModuleType = kernel_operations if kernels else plain
        decoder: Any = model.get_decoder()
        self.head = cast(nn.Linear, model.get_output_embeddings())
        self.embedding = cast(nn.Embedding, model.get_input_embeddings()).weight.detach()
        self.norm: Tensor = decoder.norm.weight
        device = self.device = self.embedding.device
        places = torch.arange(capacity, device=device)[None]
        half = self.shape.head_dim // 2
        cos, sin = decoder.rotary_emb(self.embedding[:1, None], places)  # [1, S, D], both halves the same
        self.cos, self.sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        self.zero = torch.zeros(1, dtype=torch.int32, device=device)
        #: The same number as ``position``, long ``[1]``: its low half is ``position``.
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.position, self.kv_len = self.place.view(torch.int32)[:1], self.zero.clone()
        self.starts = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.token = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.sequence = torch.zeros(capacity + 1, batch_size, dtype=torch.long, device=device)
        self.logits = self.embedding.new_zeros(batch_size, self.head.out_features)
        self.layers: list[Layer] = []
        group_aware, shares_values = bool(getattr(method, "group_aware", False)), False
        if isinstance(method, ClusteringMethod):
            shares_values = method.shares_values
        try:
            modules = find_layers(model)
            for index, (module, k) in enumerate(zip(modules, method.heads_kept(model.config), strict=True)):
                stored = count_stored(self.shape, k, group_aware)
                layer = Layer(index, module, self.shape, k, stored, shares_values, batch_size, capacity)
                self.layers.append(layer)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Give the model's parameters storage of their own again, layer by layer, without cache and clusters.

        These are freed first, and each buffer of weights as soon as it has been copied: little memory is needed.
        """
        for layer in self.layers:
            layer.free()
        while self.layers:
            self.layers.pop().weights.restore()

    @property
    def first_clustered(self) -> int:
        """Index of the first layer with clusters; 0 without any."""
        return next((layer.index for layer in self.layers if layer.clusters is not None), 0)

    def embed(self, ids: Tensor) -> Tensor:
        """Look up the embeddings of token ids."""
        return functional.embedding(ids, self.embedding)

    def last_norm(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the norm of the last hidden states ``x + y``."""
        normal: Tensor = self.operations.rms_norm(x, self.norm, self.shape.eps, y)[1]
        return normal

    def write_logits(self, hidden: Tensor) -> None:
        """Compute the logits of the last tokens' normalised hidden states ``[B, width]``."""
        weight, bias = self.head.weight.t(), self.head.bias
        if bias is None:
            torch.mm(hidden, weight, out=self.logits)
        else:
            torch.addmm(bias, hidden, weight, out=self.logits)

    def enter(self, layer: Layer, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Begin a layer with the hidden states ``x + y``: these, and their norm."""
        entered: tuple[Tensor, Tensor] = self.operations.rms_norm(x, layer.weights.input_norm, self.shape.eps, y)
        return entered

    def leave(self, layer: Layer, x: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Finish a layer from the outputs of all heads ``[B, T, H, D]``: hidden states as two summands."""
        weights = layer.weights
        y = weights.attention_output(heads.flatten(2))
        x, hidden = self.operations.rms_norm(x, weights.attention_norm, self.shape.eps, y)
        assert weights.gate_up is not None
        neurons = self.operations.gated_activation(weights.gate_up.product(hidden), self.shape.activation)
        return x, weights.mlp_output(neurons)

    def rotate_and_store(
        self,
        layer: Layer,
        projected: Projected,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        starts: Tensor | None,
        skip: int = 0,
        **heads: Any,
    ) -> Tensor:
        """Rotate and store what was projected; returns the queries ``[B, k, T, D]``."""
        weights = layer.weights
        norms = {"query_norm": weights.query_norm, "key_norm": weights.key_norm, "eps": self.shape.eps}
        query: Tensor = self.operations.rotate_and_store(
            *projected, keys, values, self.cos, self.sin, position, starts, **norms, skip=skip, **heads
        )
        return query

    def prompt_layer(
        self, layer: Layer, x: Tensor, y: Tensor | None, visible: Visible, skip: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Run all tokens of a prompt through one layer; of the last layer, only the last token is finished."""
        x, hidden = self.enter(layer, x, y)
        if layer.clusters is None:
            projected = layer.weights.project_all(hidden)
        elif layer.shared:
            projected = layer.weights.project_gathered(hidden)
        else:
            projected = layer.weights.project_rows(hidden, layer.clusters.representatives, layer.clusters.stored)
        query = self.rotate_and_store(layer, projected, layer.keys, layer.values, self.zero, visible.starts, skip=skip)
        heads = attention.prefill_attention(query, layer, visible)
        if last:
            x, heads = x[:, -1:], heads[:, -1:]
        return self.leave(layer, x, heads)

    def step(self, span: int, exact: bool, padded: bool) -> None:
        """Run ``token`` through all layers: writes its keys, values and logits, and moves on by one place.

        Args:
            span: Keys that the attention is given.
            exact: They are exactly those in the cache, with the new ones; else the others are masked.
            padded: Some row begins with padding.
        """
        torch.add(self.position, 1, out=self.kv_len)
        starts = self.starts if padded else None
        visible = Visible(span, 1, starts, None if exact else self.kv_len, self.device, self.kernels)
        x, y = self.embed(self.token)[:, None], cast("Tensor | None", None)
        for layer in self.layers:
            x, hidden = self.enter(layer, x, y)
            heads: dict[str, Any] = {}  # to pick from all
            if layer.clusters is not None and layer.shared:
                projected = layer.weights.project_gathered(hidden)
            else:
                projected = layer.weights.project_all(hidden)
                if layer.clusters is not None:
                    stored = layer.clusters.stored
                    heads = {"query_heads": layer.clusters.representatives, "key_heads": stored}
                    heads["value_heads"] = stored if layer.shares_values else None
            query = self.rotate_and_store(layer, projected, layer.keys, layer.values, self.position, starts, **heads)
            x, y = self.leave(layer, x, attention.decode_attention(query, layer, visible))
        self.write_logits(self.last_norm(x, y)[:, 0])
        self.position.copy_(self.kv_len)
