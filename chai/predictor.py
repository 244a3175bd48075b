"""Predictors of contextual sparsity: from what a layer reads of a token to a score for each head, or each neuron.

``score = W_2 relu(W_1 x + b_1) + b_2`` with a narrow middle (Liu et al. 2023, section 4), one for each layer. On disk a
folder with ``predictor.safetensors`` and ``predictor.json``, which say for which model it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

WEIGHTS, RECORD = "predictor.safetensors", "predictor.json"
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
SAMPLES = 64  # weights of each layer that stand for the model
#: Relative difference up to which sampled weights are the same: another dtype rounds them by up to 0.4 %.
TOLERANCE = 0.01


class BottleneckNetwork(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, inputs: int, bottleneck: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, bottleneck)
        self.up = nn.Linear(bottleneck, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., d]`` of any dtype to fp32 scores ``[..., N]``."""
        own = hidden.to(self.down.weight.device, torch.float32)
        return self.up(functional.relu(self.down(own)))


class Predictor(nn.Module):
    """The predictors of all layers.

    Attributes:
        shape: the model's ``model_type``, ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``.
        heads: a network for each layer.
        neurons: a network for each layer; empty where neurons aren't predicted.
        fingerprint: ``[layers, SAMPLES]``, weights of the model it is for (:func:`sample_weights`).
    """

    fingerprint: Tensor

    def __init__(self, shape: dict[str, Any], bottleneck: int, neurons: int = 0, neuron_bottleneck: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.sizes = {"bottleneck": bottleneck, "neurons": neurons, "neuron_bottleneck": neuron_bottleneck}
        width, layers = shape["hidden_size"], shape["num_hidden_layers"]
        outputs = shape["num_attention_heads"]
        self.heads = nn.ModuleList(BottleneckNetwork(width, bottleneck, outputs) for _ in range(layers))
        self.neurons = nn.ModuleList(
            BottleneckNetwork(width, neuron_bottleneck, neurons) for _ in range(layers if neurons else 0)
        )
        self.register_buffer("fingerprint", torch.zeros(layers, SAMPLES))

    def check_model(self, model: PreTrainedModel) -> None:
        """Verify that these are predictors of this very model.

        Raises:
            ValueError: its weights are others.
        """
        found = sample_weights(model)
        if found.shape != self.fingerprint.shape or bool(
            (found - self.fingerprint.cpu()).norm() > TOLERANCE * self.fingerprint.norm()
        ):
            raise ValueError("the predictor was trained for a model of the same shape with other weights")

    def to_layers(self, devices: list[torch.device]) -> Predictor:
        """Each layer's networks on the layer's own device."""
        for networks in (self.heads, self.neurons):
            for network, device in zip(networks, devices, strict=False):  # no networks where nothing is predicted
                network.to(device)
        return self

    def save(self, folder: Path, write: Callable[[Path, Callable[[Path], object]], None], **record: Any) -> None:
        """Write both files, the weights in fp16.

        Args:
            folder: exists already.
            write: ``write(path, fill)`` puts in place what ``fill`` writes to a path.
            record: more to note in the JSON file.
        """
        tensors = {name: value.half().contiguous().cpu() for name, value in self.state_dict().items()}
        tensors["fingerprint"] = self.fingerprint.float().cpu()
        content = json.dumps({**self.shape, **self.sizes, **record}, indent=2) + "\n"
        write(folder / WEIGHTS, lambda path: save_file(tensors, path))
        write(folder / RECORD, lambda path: path.write_text(content))


def read_record(folder: Path) -> dict[str, Any]:
    """The JSON file of a trained predictor.

    Raises:
        ValueError: there is none, or it isn't one.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} has no trained predictor ({RECORD}, {WEIGHTS})") from None
    sizes = ("bottleneck", "neurons", "neuron_bottleneck")
    if not isinstance(record, dict) or any(key not in record for key in (*SHAPE, *sizes)):
        raise ValueError(f"{folder / RECORD} doesn't describe a predictor; expected {', '.join((*SHAPE, *sizes))}")
    return record


def check_shape(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """The record of a predictor that was trained for a model of this shape.

    Raises:
        ValueError: there is none, or it is for another shape.
    """
    record, wanted = read_record(folder), model_shape(config)
    for key, value in wanted.items():
        if record[key] != value:
            raise ValueError(f"the predictor in {folder} is for a model with {key}={record[key]}, this one has {value}")
    return record


def load_predictor(folder: Path) -> Predictor:
    """A trained predictor, in fp32 on the CPU.

    Raises:
        ValueError: files that are missing, broken, or don't fit each other.
    """
    record = read_record(folder)
    try:
        predictor = Predictor(
            {key: record[key] for key in SHAPE}, record["bottleneck"], record["neurons"], record["neuron_bottleneck"]
        )
        predictor.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"can't read the predictor in {folder}: {reason[0]}") from None
    return predictor.requires_grad_(False)


def model_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """What a predictor must have in common with its model."""
    return {key: getattr(config, key) for key in SHAPE}


def sample_weights(model: PreTrainedModel) -> Tensor:
    """``[layers, SAMPLES]``: entries of each layer's W_O at even distances, fp32 on the CPU."""
    from chai.contextual import find_blocks
    from chai.devices import loaded

    rows = []
    for block in find_blocks(model):
        with loaded(block.output):
            weight = block.output.get_parameter("weight").detach().flatten()
            places = torch.linspace(0, len(weight) - 1, SAMPLES, device=weight.device).long()
            rows.append(weight[places].float().cpu())
    return torch.stack(rows)
