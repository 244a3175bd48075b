"""From the configuration of a model to the arguments of :mod:`chai.loading`."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedConfig, PreTrainedModel

from chai.loading import ModelSource
from chai.patching.devices import describe_devices, input_device
from experiments.config.schema import ConfigError
from experiments.runs.identity import gguf_file
from experiments.system.device import device_name
from experiments.system.processes import world_size


def model_source(config: DictConfig) -> ModelSource:
    """Return where the model comes from and how this process loads it."""
    model: Any = OmegaConf.to_container(config.model, resolve=True)
    settings = {field.name: model[field.name] for field in fields(ModelSource) if field.name in model}
    settings["gguf"] = gguf_file(config.model)
    return ModelSource(**settings, device=process_device(config.device, model["device_map"]), seed=config.seed)


def computed_on(model: PreTrainedModel) -> dict[str, str]:
    """Return the fields of ``result.json`` for the device and the dtype of a loaded model."""
    return {
        "device": describe_devices(model),
        "device_name": device_name(input_device(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def loaded_architecture(loaded: PreTrainedConfig, config: DictConfig) -> dict[str, Any]:
    """Return ``architecture`` of ``result.json``: the loaded model's values of the keys of ``model.architecture``.

    The configuration says what was asked for; a folder or the hub may hold another model.
    """
    sizes = loaded.get_text_config()
    return {str(key): getattr(loaded, str(key), getattr(sizes, str(key), None)) for key in config.model.architecture}


def process_device(device: str, device_map: Any) -> str:
    """Return the device of this process: with several processes, each takes one GPU of its machine."""
    if world_size() == 1:
        return device
    if device_map is not None:
        raise ConfigError(
            f"model.device_map={device_map} divides the model, and {world_size()} processes would each do so: "
            "set model.device_map=null, or start one process"
        )
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device={device} puts {world_size()} processes on one GPU; valid: device=cuda, a GPU for each"
        )
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device
