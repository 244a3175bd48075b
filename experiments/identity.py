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
SAMPLE = 1 << 20  # bytes of each of the blocks that stand for a large weight file
BLOCKS = 64


def settle_identity(config: DictConfig) -> None:
    """Fill in the fingerprints of local files, and name the model by what it is.

    A folder whose shape isn't that of the chosen model (``model.path`` given alone) is named after the folder and
    loses the counts and the predictor that were the other model's. Random weights are never filed under the real
    model's name, and have no predictor either.
    """
    model = config.model
    if model.random_init:
        model.name = f"{model.name}-random"
        model.predictor = None
    elif model.path is not None:
        folder = Path(model.path)
        found = read_json(folder / "config.json")
        expected = model.architecture
        if found and any(found.get(key) != expected[key] for key in SHAPE if key in expected):
            model.name = folder.resolve().name
            model.clusters = model.predictor = None
        model.fingerprint = fingerprint_model(folder)
    path = data_path(config.task)
    if path is not None and path.is_file():
        config.task.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def fingerprint_model(folder: Path) -> str:
    """A digest of configuration, tokenizer and weights: whole files, or 64 blocks spread over a large one."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".safetensors", ".bin", ".model") or not path.is_file():
            continue
        total.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as handle:
            last = max(path.stat().st_size - SAMPLE, 0)
            for block in range(BLOCKS) if last > BLOCKS * SAMPLE else range(0):
                handle.seek(last * block // (BLOCKS - 1))
                total.update(handle.read(SAMPLE))
            if last <= BLOCKS * SAMPLE:
                total.update(handle.read())
    return total.hexdigest()[:16]
