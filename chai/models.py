"""Load a Hugging Face model and its tokenizer from the hub or a folder, or build one with random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

#: Ways in which accelerate divides a model by itself.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


class ModelError(Exception):
    """A model can't be had, for a reason that one line tells."""


@dataclass
class ModelSource:
    """Where a model comes from and how it is loaded.

    Attributes:
        name: what messages call it.
        hub_id: repository on the hub.
        revision: branch, tag or commit there.
        path: a local folder in Hugging Face format, instead of the hub.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: where to put it; ``auto`` takes an accelerator if there is one.
        device_map: how accelerate divides it among devices, instead of ``device``: one of :data:`DEVICE_MAPS`, or a
            dictionary from modules to devices (an index, ``cuda:1``, ``cpu``, ``disk``). Random weights aren't divided.
        safetensors_only: refuse pickled weights, which can run code when they are loaded.
        random_init: build ``architecture`` with random weights.
        architecture: the model's configuration for ``random_init``: ``model_type`` and its sizes.
        seed: of random weights.
    """

    name: str
    hub_id: str | None = None
    revision: str = "main"
    path: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | dict[str, int | str] | None = None
    safetensors_only: bool = True
    random_init: bool = False
    architecture: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelError: there is no such model, no network, or the folder is no model.
    """
    if source.random_init:
        shape = dict(source.architecture)
        kind = shape.pop("model_type", None)
        try:
            return AutoConfig.for_model(kind, **shape)
        except Exception as error:  # each family checks its own keys and raises what it likes
            raise ModelError(f"model '{source.name}': can't build its architecture: {_one_line(error)}") from None
    where = _where(source)
    try:
        return AutoConfig.from_pretrained(where, revision=source.revision, trust_remote_code=False)
    except Exception as error:
        raise _explain(source, error) from None


def load_model(source: ModelSource) -> PreTrainedModel:
    """The model in evaluation mode on its device.

    Raises:
        ModelError: as :func:`load_config`; or weights that are missing, pickled or broken, or too little memory.
    """
    config = load_config(source)
    device = pick_device(source.device)
    dtype = _dtype(source, config)
    _check_memory(source, config, dtype, device)
    if isinstance(source.device_map, dict):
        for place in source.device_map.values():
            if place != "disk":
                pick_device(f"cuda:{place}" if isinstance(place, int) else place)
    try:
        if source.random_init:
            torch.manual_seed(source.seed)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                _where(source),
                revision=source.revision,
                config=config,
                dtype=dtype,
                device_map=source.device_map or {"": device},
                use_safetensors=True if source.safetensors_only else None,
                trust_remote_code=False,
            )
    except Exception as error:
        raise _explain(source, error) from None
    return model.eval()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: it can't be had.
    """
    try:
        where = _where(source, weights=False)
        return AutoTokenizer.from_pretrained(where, revision=source.revision, trust_remote_code=False)
    except Exception as error:
        raise _explain(source, error, what="tokenizer") from None


def pick_device(device: str) -> str:
    """``auto`` resolved: an NVIDIA or AMD GPU, Apple's, or the CPU.

    Raises:
        ModelError: the device named isn't there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise ModelError(
            f"device '{device}' isn't there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' isn't there")
    return device


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights of this architecture, counted without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _where(source: ModelSource, *, weights: bool = True) -> str:
    """The folder or hub id to load from; a folder is looked at first, for transformers would ask the hub about it."""
    if source.path is None:
        if source.hub_id is None:
            raise ModelError(f"model '{source.name}' has neither a hub id nor a path: give model.path or model.hub_id")
        return source.hub_id
    folder = Path(source.path)
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} doesn't exist")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no model folder: its config.json can't be read ({_one_line(error)})") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise ModelError(f"{folder} is no model folder: its config.json names no model_type")
    if weights and source.safetensors_only and not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        if pickled:
            raise ModelError(
                f"{folder} has no safetensors weights, only pickled ones ({pickled[0]}), which can run code when "
                "loaded: convert them, or say model.safetensors_only=false if you trust them"
            )
        raise ModelError(f"{folder} has no weights (*.safetensors)")
    return str(folder)


def _dtype(source: ModelSource, config: PreTrainedConfig) -> torch.dtype:
    if source.dtype != "auto":
        return getattr(torch, source.dtype)
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _check_memory(source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
    """Refuse a model whose weights alone don't fit, before anything is loaded (the kernel would kill us later)."""
    import psutil

    host = psutil.virtual_memory().available
    if source.device_map is not None and not source.random_init:
        device = "all devices together"
        free = host + sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    elif device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    elif device == "cpu":
        free = host
    else:
        return
    needed = weight_bytes(config, dtype)
    if needed > free:
        raise ModelError(
            f"too little memory for '{source.name}': its weights take {needed / 1e9:.1f} GB in "
            f"{str(dtype).removeprefix('torch.')}, {device}: {free / 1e9:.1f} GB free "
            "(model.dtype=float16 halves fp32; model.device_map=auto spreads over GPUs)"
        )


def _explain(source: ModelSource, error: Exception, what: str = "model") -> ModelError:
    """One line for what loading a model raises: the libraries use the same few types for everything."""
    if isinstance(error, ModelError):
        return error
    text = _one_line(error)
    place = f"folder {source.path}" if source.path is not None else f"hub repository '{source.hub_id}'"
    types, spoken, cause = set(), "", error
    while isinstance(cause, BaseException):
        types |= {parent.__name__ for parent in type(cause).__mro__}
        spoken += f" {cause}".lower()
        cause = cause.__cause__  # type: ignore[assignment]
    if types & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in spoken:
        return ModelError(f"too little memory for '{source.name}': {text}")
    if "trust_remote_code" in spoken:
        return ModelError(f"{place} needs code of its own, which is never run here (trust_remote_code stays false)")
    if source.path is None:
        if "GatedRepoError" in types:
            return ModelError(
                f"{place} is gated: accept its licence on the hub, then `hf auth login`; or give model.path=FOLDER"
            )
        if types & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
            return ModelError(f"{place} (revision {source.revision}) isn't there, or is private: check model.hub_id")
        offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "Timeout"}
        if types & offline or "couldn't connect" in spoken or "offline mode" in spoken:
            return ModelError(
                f"can't get {place}: no network, and it isn't in the local cache. "
                "Download it where there is one and give its folder: model.path=..."
            )
    return ModelError(f"can't load the {what} from {place}: {text}")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
