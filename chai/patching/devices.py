"""Devices of a model's parts, and replacement of a module's forward, also where accelerate has wrapped it.

Accelerate wraps the forward of each module of a model that is split over devices: it moves inputs to the module's
device, and loads offloaded weights (from main memory or disk) for the length of the forward. Between calls these
weights are on the ``meta`` device, which holds no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel

from chai.patching.model_info import find_layers


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module's forward computes.

    That is where its first weights are, or where accelerate loads them; the CPU for a module without weights.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for part_hook in getattr(hook, "hooks", [hook]):
            if (device := getattr(part_hook, "execution_device", None)) is not None:
                return _as_device(device)
        for tensor in part.parameters(recurse=False):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("cpu")


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of the token ids (``model.device`` is ``meta`` if the embedding is offloaded)."""
    return execution_device(model.get_input_embeddings())


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Return the device of each decoder layer, and so of its keys, values and clusters."""
    return [execution_device(layer) for layer in find_layers(model)]


def describe_devices(model: PreTrainedModel) -> str:
    """List all devices of a model in the order of its layers: ``cuda:0, cuda:1``."""
    return ", ".join(dict.fromkeys(str(device) for device in [input_device(model), *layer_devices(model)]))


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Load a module's own weights for the length of the block if they are offloaded."""
    with align_module_device(module):
        yield


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate has wrapped the module's forward."""
    return hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable, *, inside: bool = False) -> Iterator[None]:
    """Replace the forward of this module object inside the block; its class is not changed.

    With ``inside``, replace it inside accelerate's wrapper, if there is one: inputs are then on the module's device,
    and offloaded weights are loaded.
    """
    name = "_old_forward" if inside and is_hooked(module) else "forward"
    previous = module.__dict__.get(name)  # a forward that another library (accelerate) has wrapped, or its wrapper
    setattr(module, name, forward)
    try:
        yield
    finally:
        if previous is None:
            delattr(module, name)
        else:
            setattr(module, name, previous)


def _as_device(device: Any) -> torch.device:
    if isinstance(device, int):
        kind = torch.accelerator.current_accelerator()
        return torch.device(kind.type if kind is not None else "cuda", device)
    return torch.device(device)
