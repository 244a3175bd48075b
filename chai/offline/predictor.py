"""Predictors of contextual sparsity (DejaVu): from the input of a layer to a score for each head, or each neuron.

``score = W_2 relu(W_1 x + b_1) + b_2`` with a narrow middle (Liu et al. 2023, Section 4), one for each layer that is
not dense. On disk, a folder with ``predictor.safetensors`` and ``predictor.json``; both identify the model that it was
trained for, and the second holds the recall of each layer on held-out tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from chai.errors import ChaiError
from chai.patching.devices import loaded
from chai.patching.model_info import find_blocks

WEIGHTS, RECORD = "predictor.safetensors", "predictor.json"
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
SAMPLES = 64  # weights of each layer that identify the model
#: Width of the middle in the authors' predictors, for every size of OPT.
LOW_RANK = 1000
#: Relative difference up to which sampled weights are equal: another dtype rounds them by up to 0.4 %.
TOLERANCE = 0.01


class BottleneckNetwork(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, inputs: int, bottleneck: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, bottleneck)
        self.up = nn.Linear(bottleneck, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute fp32 scores ``[..., N]`` from ``[..., d]`` of any dtype."""
        hidden = hidden.to(self.down.weight.device, torch.float32)
        return self.up(functional.relu(self.down(hidden)))


class Predictor(nn.Module):
    """The predictors of all layers that are not dense.

    Args:
        shape: As the attribute.
        bottleneck: Width of the middle of a network for heads.
        neurons: Width of the MLP; 0 if neurons are not predicted.
        neuron_bottleneck: Width of the middle of a network for neurons.
        dense_layers: Layers without a network for heads.
        dense_mlp_layers: Layers without a network for neurons.

    Attributes:
        shape: ``model_type``, ``hidden_size``, ``num_hidden_layers`` and ``num_attention_heads`` of the model.
        heads: A network for each layer that is not dense, by the layer's number as text.
        neurons: The same for neurons; empty if neurons are not predicted.
        fingerprint: ``[layers, SAMPLES]``, weights of the model (:func:`sample_weights`).
    """

    fingerprint: Tensor

    def __init__(
        self,
        shape: dict[str, Any],
        bottleneck: int,
        neurons: int = 0,
        neuron_bottleneck: int = 0,
        dense_layers: Collection[int] = (),
        dense_mlp_layers: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.shape = shape
        self.sizes = {
            "bottleneck": bottleneck,
            "neurons": neurons,
            "neuron_bottleneck": neuron_bottleneck,
            "dense_layers": sorted(dense_layers),
            "dense_mlp_layers": sorted(dense_mlp_layers),
        }
        width, layers = shape["hidden_size"], shape["num_hidden_layers"]

        def networks(middle: int, outputs: int, dense: Collection[int]) -> nn.ModuleDict:
            sparse = [layer for layer in range(layers) if layer not in dense]
            return nn.ModuleDict({str(layer): BottleneckNetwork(width, middle, outputs) for layer in sparse})

        self.heads = networks(bottleneck, shape["num_attention_heads"], dense_layers)
        self.neurons = networks(neuron_bottleneck, neurons, dense_mlp_layers) if neurons else nn.ModuleDict()
        self.register_buffer("fingerprint", torch.zeros(layers, SAMPLES))

    def check_model(self, model: PreTrainedModel) -> None:
        """Verify that the predictors were trained for this very model (ValueError: the model has other weights)."""
        weights = sample_weights(model)
        if weights.shape != self.fingerprint.shape or bool(
            (weights - self.fingerprint.cpu()).norm() > TOLERANCE * self.fingerprint.norm()
        ):
            raise ChaiError(
                "the predictor was trained for a model of the same shape with other weights", remedy="train_predictor"
            )

    def to_layers(self, devices: list[torch.device]) -> Predictor:
        """Move the networks of each layer to its device."""
        for networks in (self.heads, self.neurons):
            for layer, network in networks.items():
                network.to(devices[int(layer)])
        return self

    def save(self, folder: Path, write: Callable[[Path, Callable[[Path], object]], None], **record: Any) -> None:
        """Write both files, the weights in fp16, by ``write(path, fill)``; ``record`` is added to the JSON file."""
        tensors = {name: value.half().contiguous().cpu() for name, value in self.state_dict().items()}
        tensors["fingerprint"] = self.fingerprint.float().cpu()
        content = json.dumps({**self.shape, **self.sizes, **record}, indent=2) + "\n"
        write(folder / WEIGHTS, lambda path: save_file(tensors, path))
        write(folder / RECORD, lambda path: path.write_text(content))


def read_record(folder: Path) -> dict[str, Any]:
    """Read the JSON file of a trained predictor (ValueError: it is missing or damaged)."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        raise ChaiError(f"{folder} has no trained predictor ({RECORD}, {WEIGHTS})", remedy="train_predictor") from None
    sizes = ("bottleneck", "neurons", "neuron_bottleneck")
    if not isinstance(record, dict) or any(key not in record for key in (*SHAPE, *sizes)):
        expected = ", ".join((*SHAPE, *sizes))
        raise ChaiError(f"{folder / RECORD} does not describe a predictor; expected {expected}", "train_predictor")
    return record


def check_shape(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """Read the record of a predictor, and verify that it was trained for a model of this shape.

    Raises:
        ValueError: It is missing, damaged, or for another shape.
    """
    record, wanted = read_record(folder), model_shape(config)
    for key, value in wanted.items():
        if record[key] != value:
            raise ChaiError(
                f"the predictor in {folder} is for a model with {key}={record[key]}, this one has {value}",
                remedy="train_predictor",
            )
    return record


def recall_at(record: dict[str, Any], part: str, sparsity: float, layers: Collection[int]) -> float | None:
    """Return the mean recall on held-out tokens that a predictor's record states.

    Args:
        record: Of :func:`read_record`.
        part: ``heads`` or ``neurons``.
        sparsity: Share that is masked.
        layers: Layers to average over.

    Returns:
        The mean, or ``None`` if the recall was not measured at this sparsity. Records of earlier versions have only
        the mean over all layers.
    """
    if "recall" not in record:
        return record.get("metrics", {}).get(f"recall_{round(100 * sparsity)}") if part == "heads" else None
    for measured, by_layer in record["recall"].get(part, {}).items():
        if abs(float(measured) - sparsity) < 1e-9:
            values = [by_layer[layer] for layer in layers if by_layer[layer] is not None]
            return sum(values) / len(values) if values else None
    return None


def load_predictor(folder: Path) -> Predictor:
    """Load a trained predictor, in fp32 on the CPU.

    Raises:
        ValueError: Files are missing or damaged, or do not fit each other.
    """
    record = read_record(folder)
    try:
        predictor = Predictor(
            {key: record[key] for key in SHAPE},
            record["bottleneck"],
            record["neurons"],
            record["neuron_bottleneck"],
            record.get("dense_layers", ()),  # records of earlier versions have no dense layers
            record.get("dense_mlp_layers", ()),
        )
        predictor.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"cannot read the predictor in {folder}: {reason[0]}") from None
    return predictor.requires_grad_(False)


def model_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what a predictor must have in common with its model."""
    return {key: getattr(config, key) for key in SHAPE}


def sample_weights(model: PreTrainedModel) -> Tensor:
    """Return ``[layers, SAMPLES]``: entries of each layer's W_O at even distances, fp32 on the CPU."""
    rows = []
    for block in find_blocks(model):
        with loaded(block.output):
            weight = block.output.get_parameter("weight").detach().flatten()
            index = torch.linspace(0, len(weight) - 1, SAMPLES, device=weight.device).long()
            rows.append(weight[index].float().cpu())
    return torch.stack(rows)
