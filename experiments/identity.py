"""What a local path holds: fingerprints that stand for it in a run's identity, wherever the files lie.

Reads a few files and imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from omegaconf import DictConfig

from experiments.runs import read_json
from experiments.tasks import data_path

SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
SAMPLE = 1 << 20  # bytes read at either end of a weight file


def settle_identity(config: DictConfig) -> None:
    """Fill in the fingerprints of local files, and name the model by what it is.

    A folder whose shape isn't that of the chosen model (``model.path`` given alone) is named after the folder and
    loses the counts that were the other model's. Random weights are never filed under the real model's name.
    """
    model = config.model
    if model.random_init:
        model.name = f"{model.name}-random"
    elif model.path is not None:
        folder = Path(model.path)
        found = read_json(folder / "config.json")
        expected = model.architecture
        if found and any(found.get(key) != expected[key] for key in SHAPE if key in expected):
            model.name = folder.resolve().name
            model.clusters = None
        model.fingerprint = fingerprint_model(folder)
    path = data_path(config.task)
    if path is not None and path.is_file():
        config.task.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def fingerprint_model(folder: Path) -> str:
    """A digest of the configuration, the tokenizer, and the size and both ends of each weight file."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".safetensors", ".bin", ".model"):
            continue
        total.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as handle:
            total.update(handle.read(SAMPLE))
            if path.stat().st_size > 2 * SAMPLE:
                handle.seek(-SAMPLE, 2)
                total.update(handle.read(SAMPLE))
    return total.hexdigest()[:16]
