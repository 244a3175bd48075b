"""The output projection of each layer, by which the error of a head's attention is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chai.clustering.distances import output_factors
from chai.heads import repeat_kv
from chai.patching.devices import execution_device, loaded, replaced_forward
from chai.patching.model_info import find_blocks

#: Width of a random projection of the errors of the output, which keeps their products.
SKETCH_WIDTH = 128


def output_projections(model: PreTrainedModel) -> list[nn.Module]:
    """Return the output projection of each layer.

    Raises:
        ValueError: It is quantized, or replaced by another module (adapters).
    """
    modules = [block.output for block in find_blocks(model)]
    for module in modules:
        weight = module.weight.data if isinstance(module, (nn.Linear, Conv1D)) else None
        if type(weight) is not Tensor or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"the output projection is a {type(module).__name__}; valid: a linear layer that is not quantized"
            )
    return modules


def output_weight(module: nn.Module) -> Tensor:
    """Return W_O, ``[d, H * D]``, of an output projection; offloaded weights are loaded."""
    with loaded(module):
        weight = cast(Tensor, module.weight).detach()
        return (weight.t() if isinstance(module, Conv1D) else weight).clone()


@contextmanager
def replaced_outputs(
    model: PreTrainedModel, weights: Mapping[int, Tensor], applies: Callable[[int], bool]
) -> Iterator[None]:
    """Multiply by other output projections ``[d, H * D]`` inside the block, while they apply to a layer.

    Raises:
        ValueError: An output projection is quantized, or replaced by another module.
    """
    with ExitStack() as stack:
        for index, module in enumerate(output_projections(model) if weights else ()):
            if index in weights:
                forward = _choose_weight(index, module, weights[index], applies)
                stack.enter_context(replaced_forward(module, forward, inside=True))
        yield


def _choose_weight(
    index: int, module: nn.Module, weight: Tensor, applies: Callable[[int], bool]
) -> Callable[[Tensor], Tensor]:
    """Build the forward of an output projection that has another weight while this applies to its layer."""
    weight = weight.to(execution_device(module), cast(Tensor, module.weight).dtype)

    def forward(hidden: Tensor) -> Tensor:
        if not applies(index):
            return cast(Tensor, type(module).forward(module, hidden))  # not module.forward, which may lead back here
        return functional.linear(hidden, weight, cast("Tensor | None", module.bias))

    return forward


class HeadOutputs:
    """Values of the heads in coordinates in which the error of a layer's output is measured.

    ``__call__`` gives ``V_h F_h``, of the same length as ``V_h W_O,h`` (:func:`chai.clustering.distances.output`);
    :meth:`sketch` gives ``V_h W_O,h S``, in which the errors of several heads can be added.

    Raises:
        ValueError: An output projection is quantized, or replaced by another module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._num_heads = model.config.get_text_config().num_attention_heads
        self._projections = output_projections(model)
        self._factors = [output_factors(output_weight(module), self._num_heads) for module in self._projections]

    def __call__(self, layers: Sequence[int], values: Tensor) -> Tensor:
        """Return ``[L, B, H, T, D]`` (fp32) from the values ``[L, B, H_kv, T, D]`` of some layers."""
        factors = torch.stack([self._factors[layer].to(values.device) for layer in layers])
        return repeat_kv(values.float(), self._num_heads, dim=2) @ factors[:, None]

    def sketch(self, layer: int, values: Tensor, seed: int) -> Tensor:
        """Return ``[B, H, T, width]`` (fp32) from the values ``[B, H_kv, T, D]`` of a layer.

        S is a random matrix of independent normal entries with variance 1 / width, another one for each layer and seed.
        It keeps products in the mean: ``E[<x S, y S>] = <x, y>``. A narrow W_O is multiplied as it is.
        """
        weight = output_weight(self._projections[layer]).to(values.device).float()
        blocks = weight.unflatten(1, (self._num_heads, -1)).permute(1, 2, 0)  # [H, D, d]
        if blocks.shape[2] > SKETCH_WIDTH:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
            projection = torch.randn(blocks.shape[2], SKETCH_WIDTH, generator=generator) / SKETCH_WIDTH**0.5
            blocks = blocks @ projection.to(blocks.device)
        return repeat_kv(values.float(), self._num_heads) @ blocks
