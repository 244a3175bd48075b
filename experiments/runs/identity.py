"""What a local path holds: fingerprints that stand for it in a run's identity, wherever the files lie.

Reads a few files and imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from omegaconf import DictConfig

from experiments.config.schema import ConfigError
from experiments.runs.folder import read_json
from experiments.runs.tasks import data_path

SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
SAMPLE = 1 << 20  # bytes of each of the blocks that stand for a large weight file
BLOCKS = 64


def settle_identity(config: DictConfig) -> None:
    """Fill in the fingerprints of local files, and name the model by what it is.

    A folder whose shape isn't that of the chosen model (``model.path`` given alone) is named after the folder and
    loses the counts, the predictor and the profile that were the other model's. Random weights are never filed under
    the real model's name, and have no predictor either; a profile of their shape is good enough to probe them with.
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
            model.clusters = model.predictor = model.profile = None
        model.fingerprint = fingerprint_model(folder)
    path = data_path(config.task)
    if path is not None and path.is_file():
        config.task.fingerprint = fingerprint_file(path)
    if config.corpus is not None and config.corpus.path is not None:
        path = Path(config.corpus.path)
        if config.corpus.hub_id is None:  # given alone, it isn't a copy of a known corpus
            config.corpus.name = path.stem
        if path.is_file():
            config.corpus.fingerprint = fingerprint_file(path)


def check_profile(config: DictConfig) -> None:
    """Refuse a profile that was made of other weights than the run's; its shape is the library's matter.

    Raises:
        ConfigError: names both models.
    """
    if config.method.get("profile") is None or config.model.random_init:
        return
    path = Path(config.method.profile)
    there = (read_json((path if path.is_dir() else path.parent) / "profile.json") or {}).get("model", {})
    for name, here in (("fingerprint", config.model.fingerprint), ("id", config.model.hub_id)):
        if None not in (there.get(name), here) and there[name] != here:
            raise ConfigError(
                f"method.profile={config.method.profile} is of another model, {there.get('name')} ({name} "
                f"{there[name]}), than {config.model.name} ({here}); make one with experiment=profile"
            )
        if None not in (there.get(name), here):
            return


def fingerprint_file(path: Path) -> str:
    """A digest of a file's content."""
    total = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(SAMPLE), b""):
            total.update(block)
    return total.hexdigest()[:16]


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
