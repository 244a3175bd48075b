"""Where the parts of a model compute: on one device, or on several among which accelerate has divided it.

Accelerate wraps the forward of a divided model's modules: it brings inputs to the module's device, and weights that
are offloaded (to the CPU's memory beside a GPU, or to disk) for just as long as the forward takes. In between such
weights are on the ``meta`` device, which holds no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def execution_device(module: nn.Module) -> torch.device:
    """Where a module's forward computes: where its weights are, or where accelerate brings them.

    Of a module whose parts are on several devices, that of its first weights. Without any weights: the CPU.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if (device := getattr(one, "execution_device", None)) is not None:
                return _as_device(device)
        for tensor in part.parameters(recurse=False):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("cpu")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: ``model.device``, which is ``meta`` where the embedding is offloaded, without that flaw."""
    return execution_device(model.get_input_embeddings())


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each decoder layer computes, and so where its keys, values and membership are."""
    return [execution_device(layer) for layer in model.get_decoder().layers]


def describe_devices(model: PreTrainedModel) -> str:
    """All devices that a model computes on, in the order of its layers: ``cuda:0, cuda:1``."""
    return ", ".join(dict.fromkeys(str(device) for device in [input_device(model), *layer_devices(model)]))


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """A module's own weights are there inside the block, also if they are offloaded."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate has wrapped the module's forward, and nobody else has."""
    return hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__


def _as_device(device: Any) -> torch.device:
    """What accelerate calls a device: an index, a name or a device."""
    if isinstance(device, int):
        kind = torch.accelerator.current_accelerator()
        return torch.device(kind.type if kind is not None else "cuda", device)
    return torch.device(device)
