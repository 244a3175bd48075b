"""The output projection of each layer, by which the error of a head's attention is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chai.clustering.distances import output_factors
from chai.heads import repeat_kv
from chai.patching.devices import loaded
from chai.patching.model_info import find_blocks

#: Width of a random projection of the errors of the output, which keeps their products.
SKETCH_WIDTH = 128


def output_weights(model: PreTrainedModel) -> list[Tensor]:
    """Return W_O of each layer, ``[d, H * D]``.

    Raises:
        ValueError: It is quantized, or replaced by another module (adapters).
    """
    weights = []
    for block in find_blocks(model):
        if not (type(block.output) is nn.Linear or isinstance(block.output, Conv1D)):
            raise ValueError(
                f"the output projection is a {type(block.output).__name__}; valid: a linear layer that is not quantized"
            )
        with loaded(block.output):
            weight = block.output.weight.detach()
            weights.append((weight.t() if isinstance(block.output, Conv1D) else weight).clone())
    return weights


class HeadOutputs:
    """Values of the heads in coordinates in which the error of a layer's output is measured.

    ``__call__`` gives ``V_h F_h``, of the same length as ``V_h W_O,h`` (:func:`chai.clustering.distances.output`);
    :meth:`sketch` gives ``V_h W_O,h S``, in which the errors of several heads can be added.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._num_heads = model.config.num_attention_heads
        self._weights = output_weights(model)
        self._factors = [output_factors(weight, self._num_heads) for weight in self._weights]
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, layers: Sequence[int], values: Tensor) -> Tensor:
        """Return ``[L, B, H, T, D]`` (fp32) from the values ``[L, B, H_kv, T, D]`` of some layers."""
        factors = torch.stack([self._factors[layer].to(values.device) for layer in layers])
        return repeat_kv(values.float(), self._num_heads, dim=2) @ factors[:, None]

    def sketch(self, layer: int, values: Tensor) -> Tensor:
        """Return ``[B, H, T, width]`` (fp32) from the values ``[B, H_kv, T, D]`` of a layer.

        S is another random matrix at each call, of independent normal entries with variance 1 / width, which keeps
        products in the mean: ``E[<x S, y S>] = <x, y>``. A narrow W_O is multiplied as it is.
        """
        blocks = self._weights[layer].float().unflatten(1, (self._num_heads, -1)).permute(1, 2, 0)  # [H, D, d]
        if blocks.shape[2] > SKETCH_WIDTH:
            projection = torch.randn(blocks.shape[2], SKETCH_WIDTH, generator=self._generator) / SKETCH_WIDTH**0.5
            blocks = blocks @ projection.to(blocks.device)
        return repeat_kv(values.float(), self._num_heads) @ blocks
