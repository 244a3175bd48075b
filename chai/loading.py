"""Load a Hugging Face model and its tokenizer from the hub or a folder, or build one with random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chai.errors import ChaiError
from chai.gguf_files import GgufError, convert

#: Floating-point types by their names in safetensors files.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ModelError(ChaiError):
    """Raised when a model cannot be loaded."""


@dataclass
class ModelSource:
    """Where a model comes from and how it is loaded.

    Attributes:
        device_map: Split over devices by accelerate, instead of ``device``: ``auto``, ``balanced``,
            ``balanced_low_0``, ``sequential``, or a dictionary from modules to devices (an index, ``cuda:1``,
            ``cpu``, ``disk``). Random weights are not split.
        architecture: Configuration for ``random_init``: ``model_type`` and its sizes.
    """

    name: str  # for messages
    hub_id: str | None = None  # repository on the hub
    revision: str = "main"  # branch, tag or commit there
    path: str | None = None  # a local folder in Hugging Face format, instead of the hub
    gguf: str | None = None  # a GGUF file, instead of the hub: converted once (chai.gguf_files)
    dtype: str = "auto"  # auto (as stored), float32, bfloat16 or float16
    device: str = "auto"  # auto takes an accelerator if there is one
    device_map: str | dict[str, int | str] | None = None
    safetensors_only: bool = True  # refuse pickled weights, which can run code when they are loaded
    random_init: bool = False  # build architecture with random weights
    architecture: dict[str, Any] = field(default_factory=dict)
    seed: int = 0  # of random weights


def load_config(source: ModelSource) -> PreTrainedConfig:
    """Load the configuration of a model, without its weights.

    Raises:
        ModelError: Unknown model, no network, or a folder without a model.
    """
    if source.random_init:
        shape = dict(source.architecture)
        kind = shape.pop("model_type", None)
        try:
            return AutoConfig.for_model(kind, **shape)
        except Exception as error:  # families raise many types
            raise ModelError(f"model '{source.name}': cannot build its architecture: {_one_line(error)}") from None
    try:
        where = _locate(source)
        return AutoConfig.from_pretrained(where, revision=source.revision, trust_remote_code=False)
    except Exception as error:
        raise _explain(source, error) from None


def load_model(source: ModelSource) -> PreTrainedModel:
    """Load a model in evaluation mode to its device.

    Raises:
        ModelError: As :func:`load_config`; or weights that are missing, pickled or damaged, or too little memory.
    """
    config = load_config(source)
    device = pick_device(source.device)
    dtype = _dtype(source, config)
    _check_memory(source, config, dtype or torch.bfloat16, device)
    if isinstance(source.device_map, dict):
        for place in source.device_map.values():
            if place != "disk":
                pick_device(f"cuda:{place}" if isinstance(place, int) else place)
    try:
        if source.random_init:
            torch.manual_seed(source.seed)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                _locate(source),
                revision=source.revision,
                config=config,
                dtype="auto" if dtype is None else dtype,
                device_map=source.device_map or {"": device},
                use_safetensors=True if source.safetensors_only else None,
                trust_remote_code=False,
            )
    except Exception as error:
        raise _explain(source, error) from None
    return model.eval()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model (ModelError: it cannot be loaded)."""
    try:
        where = _locate(source, weights=False)
        return AutoTokenizer.from_pretrained(where, revision=source.revision, trust_remote_code=False)
    except Exception as error:
        raise _explain(source, error, what="tokenizer") from None


def pick_device(device: str) -> str:
    """Resolve ``auto`` to an NVIDIA or AMD GPU, Apple's, or the CPU; check any other device.

    Raises:
        ModelError: The device is not available.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise ModelError(
            f"device '{device}' is not available: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' is not available")
    return device


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Count the bytes of the weights of an architecture without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _locate(source: ModelSource, *, weights: bool = True) -> str:
    """Return the folder or hub id to load from; check a folder first, for transformers would look it up on the hub."""
    if source.gguf is not None:
        try:
            return str(convert(Path(source.gguf)))
        except GgufError as error:
            raise ModelError(str(error), error.remedy) from None
    if source.path is None:
        if source.hub_id is None:
            raise ModelError(f"model '{source.name}' has neither a path nor a hub id", remedy="no_source")
        return source.hub_id
    folder = Path(source.path)
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} is not a model folder: its config.json cannot be read ({_one_line(error)})"
        ) from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise ModelError(f"{folder} is not a model folder: its config.json has no model_type")
    if weights and source.safetensors_only and not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        if pickled:
            raise ModelError(
                f"{folder} has no safetensors weights, only pickled ones ({pickled[0]}), which can run code",
                remedy="pickled_weights",
            )
        raise ModelError(f"{folder} has no weights (*.safetensors)")
    return str(folder)


def _dtype(source: ModelSource, config: PreTrainedConfig) -> torch.dtype | None:
    """Return the type to load: the given one, that of the configuration, or that of the weights in a folder.

    ``None`` if only ``transformers`` can see the weights, once it has downloaded them.
    """
    if source.dtype != "auto":
        return getattr(torch, source.dtype)
    stored = getattr(config, "dtype", None)
    if isinstance(stored, torch.dtype):
        return stored
    if source.random_init:
        return torch.float32
    return None if source.path is None else _stored_dtype(Path(source.path))


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the type of the first floating-point weights in a folder, as ``transformers`` does for ``auto``."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118, not a dictionary
                dtype = FLOATING.get(weights.get_slice(name).get_dtype())
                if dtype is not None:
                    return dtype
    return None


def _check_memory(source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
    """Refuse a model whose weights do not fit, before anything is loaded (the kernel would kill the process later)."""
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
            f"{str(dtype).removeprefix('torch.')}, {device}: {free / 1e9:.1f} GB free",
            remedy="memory",
        )


def _explain(source: ModelSource, error: Exception, what: str = "model") -> ModelError:
    """Summarize in one line what loading a model raised: the libraries use the same few types for everything."""
    if isinstance(error, ModelError):
        return error
    text = _one_line(error)
    local = source.gguf or source.path
    place = f"{'file' if source.gguf else 'folder'} {local}" if local else f"hub repository '{source.hub_id}'"
    types, messages, cause = set(), "", error
    while isinstance(cause, BaseException):
        types |= {parent.__name__ for parent in type(cause).__mro__}
        messages += f" {cause}".lower()
        cause = cause.__cause__  # type: ignore[assignment]
    if types & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in messages:
        return ModelError(f"too little memory for '{source.name}': {text}", remedy="memory")
    if "trust_remote_code" in messages:
        return ModelError(f"{place} needs code of its own, which is never executed (trust_remote_code stays false)")
    if local is None:
        if "GatedRepoError" in types:
            return ModelError(f"{place} is gated: accept its licence on the hub, then `hf auth login`", remedy="gated")
        if types & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
            return ModelError(f"{place} (revision {source.revision}) does not exist or is private", remedy="hub_id")
        offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "Timeout"}
        if types & offline or "couldn't connect" in messages or "offline mode" in messages:
            return ModelError(f"cannot download {place}: no network, and it is not in the cache", remedy="offline")
    return ModelError(f"cannot load the {what} from {place}: {text}")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
