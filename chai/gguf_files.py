"""Convert GGUF files (llama.cpp's format) to model folders, once per file, in a cache folder of the user.

The weights are dequantized: quantization saves space in the file, not in memory. A converted folder is named by the
SHA-256 of its file, appears at once (it is renamed when complete), and is verified by its own hash when it is used.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from chai.errors import ChaiError
from chai.folders import cache_folder

WEIGHTS, RECORD = "model.safetensors", "source.json"
MAGIC = b"GGUF"
VERSION = 1  # of the conversion: part of the folder's name
HEADROOM = 1.05  # of the disk space that the weights take, for the tokenizer and metadata


class GgufError(ChaiError):
    """Raised when a GGUF file cannot be converted; the message is one line."""


def convert(file: Path) -> Path:
    """Return a folder in Hugging Face format with the model and tokenizer of a GGUF file.

    Weights keep the type of the file if that is float32 or float16, and become bfloat16 if it is quantized. Processes
    that convert the same file wait for each other.

    Raises:
        GgufError: The file is missing, truncated or of another format, transformers does not read its architecture,
            the package ``gguf`` is not installed, or the disk is full.
    """
    check_file(file)
    digest = file_digest(file)
    target = cache_folder("gguf") / f"{digest[:20]}-{VERSION}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not is_complete(target):
                for leftover in target.parent.glob(f"{target.name}*/"):  # damaged, or of a killed process
                    shutil.rmtree(leftover)
                _write_folder(file, digest, target)
    except OSError as error:
        reason = "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise GgufError(f"cannot write the converted model of {file.name} to {target.parent}: {reason}") from None
    return target


def check_file(file: Path) -> None:
    """Verify that a file exists and begins as a GGUF file does, and that the package that reads it is installed."""
    try:
        with open(file, "rb") as handle:
            magic = handle.read(len(MAGIC))
    except OSError as error:
        raise GgufError(f"cannot read the GGUF file {file}: {error.strerror or error}") from None
    if magic != MAGIC:
        raise GgufError(f"{file} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    if importlib.util.find_spec("gguf") is None:
        raise GgufError("reading GGUF files needs the package gguf, which is not installed", remedy="gguf")


def is_complete(folder: Path) -> bool:
    """Return whether a converted folder has the weights that its record names."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return bool(record["weights_sha256"] == file_digest(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, which is read once unless its size or time of modification changes."""
    status = path.stat()
    return _digest(path.absolute(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def _write_folder(file: Path, digest: str, target: Path) -> None:
    """Convert into a temporary folder beside ``target``, and rename that when it is complete."""
    dtype, num_weights = _read_header(file)
    needed, free = int(num_weights * dtype.itemsize * HEADROOM), shutil.disk_usage(target.parent).free
    if needed > free:
        raise _no_space(file, needed, f"{target.parent} has {_size(free)} free")
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent, ignore_cleanup_errors=True) as part:
        folder = Path(part) / "model"
        model, tokenizer = _load(file, dtype)
        try:
            model.save_pretrained(folder, max_shard_size="1TB")
            tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:  # another process may have filled the disk meanwhile
            reason = f"writing to {target.parent} failed: {_one_line(error)}"
            raise _no_space(file, needed, reason) from None
        record = {
            "file": file.name,
            "sha256": digest,
            "dtype": str(dtype).removeprefix("torch."),
            "weights_sha256": file_digest(folder / WEIGHTS),
            "transformers": transformers.__version__,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        folder.rename(target)


def _read_header(file: Path) -> tuple[torch.dtype, int]:
    """Return the type to store the weights in, and their number; a GgufError if the file is damaged."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
        # Matrices decide: vectors are float32 in every file.
        kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
        count = sum(int(tensor.n_elements) for tensor in tensors)
    except Exception as error:  # numpy's and the reader's own types, depending on where the file ends
        raise GgufError(f"{file} is truncated or damaged: {_one_line(error)}") from None
    if not count:
        raise GgufError(f"{file} has no weights")
    dtype = torch.float32 if kinds == {"F32"} else torch.float16 if kinds <= {"F32", "F16"} else torch.bfloat16
    return dtype, count


def _load(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and tokenizer of a GGUF file, as they can be saved in Hugging Face format."""
    settings: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **settings)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **settings)
    except Exception as error:  # transformers raises many types
        raise GgufError(f"transformers cannot read the GGUF file {file}: {_one_line(error)}") from None
    # A model that was read from a GGUF file refuses to be saved: copy its weights into a plain one.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    config._name_or_path = ""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model, tokenizer


def _no_space(file: Path, needed: int, reason: str) -> GgufError:
    advice = "set XDG_CACHE_HOME to a folder with enough space"
    return GgufError(f"the converted model of {file.name} takes {_size(needed)}; {reason} ({advice})")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
