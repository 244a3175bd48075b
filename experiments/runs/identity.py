"""Identity of a run: a digest of its configuration, in which local files count by fingerprints of their contents.

Reads a few files and imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.config.compose import choices, compose_config, data_path, fewshot_path
from experiments.config.schema import ConfigError
from experiments.runs.files import BLOCK, content_digest, digest, read_json

#: Keys that a run's result does not depend on: where it ran and where its files were.
MACHINE_ONLY = (
    "device", "results_dir", "force", "logger", "model.device_map", "model.resources", "model.path", "model.gguf",
    "model.package", "model.given", "model.predictor", "model.profile", "task.data_dir", "task.include_path",
    "task.fewshot_file", "task.text", "experiment.install", "experiment.checkpoint_every", "corpus.path",
)  # fmt: skip
#: Paths that count by the contents of their files: all files of a folder, or the one named here.
BY_CONTENT = {
    "method.predictor": None,
    "experiment.corpus": None,
    "experiment.other_text": None,
    "method.profile": "profile.json",
}
#: Keys that earlier versions did not have: null or empty, a run is the one that it was without them.
ADDED = (
    "method.dense_layers", "method.dense_mlp_layers", "corpus.python", "corpus.joined", "task.registered",
    "task.overrides", "task.fewshot_fingerprint", "task.apply_chat_template", "task.key", "task.filler",
    "task.lengths", "task.depths", "task.items_per_cell", "task.seed", "experiment.document_tokens",
)  # fmt: skip
#: Keys that earlier versions did not have, and the value with which a run is the one that it was without them.
ADDED_DEFAULTS = {
    "method.metric": "attention", "profile.metrics": None, "profile.budget": "heads", "profile.heads": None,
    "profile.kl": 0.1, "profile.metric": "output", "profile.sensitivity_texts": None, "profile.sensitivity_tokens": 256,
    "profile.refit_texts": None, "method.refit": False,
}  # fmt: skip
#: A key that earlier versions had, with the value that all runs of it share now.
REMOVED = {"profile.error": 0.1}
#: Numbers that SpAtten's runs had before `method.pruning` and `method.preset` were settings: those of preset=linear.
SPATTEN = {"tokens": 0.5, "heads": 0.75, "values": 1.0, "unpruned_tokens": 0.15, "unpruned_heads": 0.3}
#: Keys of a model that belong to its weights.
MODEL_FILES = ("clusters", "predictor", "profile")
HUB = ("hub_id", "revision")
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
BLOCKS = 64  # blocks that represent a large weight file


def run_identity(config: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without machine settings, and with fingerprints in place of paths."""
    identity: Any = OmegaConf.to_container(config, resolve=True)
    for key in MACHINE_ONLY:
        section, name = _section(identity, key)
        section.pop(name, None)
    for key in ADDED:
        section, name = _section(identity, key)
        if section.get(name) in (None, {}):
            section.pop(name, None)
    for key, default in ADDED_DEFAULTS.items():
        section, name = _section(identity, key)
        if name in section and section[name] == default:
            del section[name]
    for key, value in REMOVED.items():
        section, name = _section(identity, key)
        if section:
            section[name] = value
    for key, file in BY_CONTENT.items():
        section, name = _section(identity, key)
        if section.get(name) is not None:
            path = _file_beside(section[name], file) if file else Path(section[name])
            section[name] = content_digest(path) or section[name]
    if identity["experiment"].get("stride") is not None:
        window, stride = (identity["experiment"].get(key) for key in ("window", "stride"))
        identity["experiment"]["stride"] = None if stride == window else stride  # the default is the window
    if "pruning" in (identity["method"] or {}):
        identity["method"] = _as_before_pruning(identity["method"])
    # Sections that the experiment does not have at all are left out.
    return {key: value for key, value in identity.items() if value is not None or key not in ("profile", "corpus")}


def _as_before_pruning(method: dict[str, Any]) -> dict[str, Any]:
    """Return SpAtten's settings as earlier versions had them, which chose per row; other choices stay as they are."""
    if method["pruning"] != "per_row" or method["preset"] not in (None, "linear"):
        return method
    rest = {key: value for key, value in method.items() if key not in ("pruning", "preset")}
    return {key: SPATTEN.get(key) if value is None else value for key, value in rest.items()}


def _section(identity: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary that holds a dotted key, and the key's last part."""
    section, _, name = key.rpartition(".")
    return (identity.get(section) or {}) if section else identity, name


def _file_beside(path: str, name: str) -> Path:
    """Return the path of a file in the folder ``path``, or beside the file ``path``."""
    return (Path(path) if Path(path).is_dir() else Path(path).parent) / name


def run_id(config: DictConfig) -> str:
    """Return the run's id, which is the same on any machine."""
    return digest(run_identity(config))


def settings_id(config: DictConfig) -> str:
    """Return an id that is equal for runs that differ only in their method, and so may be compared."""
    return digest({key: value for key, value in run_identity(config).items() if key != "method"})


def resolve_fingerprints(config: DictConfig) -> None:
    """Fill in the fingerprints of local files, and name the model by its contents.

    A folder whose shape differs from the chosen model's (``model.path`` set alone), and any ``model.gguf``, is named
    after the file and loses the chosen model's cluster counts, predictor and profile. Random weights never get the real
    model's name and have no predictor; a profile of their shape is kept, since it suffices for benchmarks.
    """
    model = config.model
    if model.random_init:
        model.name = f"{model.name}-random"
        model.predictor = None
    elif (file := gguf_file(model)) is not None:
        if model.gguf is not None:
            name_after_files(model, Path(file).stem)
        model.fingerprint = fingerprint_files([Path(file)])
    elif model.path is not None:
        folder = Path(model.path)
        found = read_json(folder / "config.json")
        expected = model.architecture
        if found and any(found.get(key) != expected[key] for key in SHAPE if key in expected):
            name_after_files(model, folder.resolve().name)
        model.fingerprint = fingerprint_model(folder)
    fingerprint_task(config.task)
    if config.corpus is not None and config.corpus.path is None and config.corpus.python is not None:
        config.corpus.fingerprint = f"python-{platform.python_version()}"
    if config.corpus is not None and config.corpus.path is not None:
        path = Path(config.corpus.path)
        if config.corpus.hub_id is None:  # not a copy of a known corpus
            config.corpus.name = path.stem
        if path.is_file():
            config.corpus.fingerprint = content_digest(path, digits=16)


def fingerprint_task(task: DictConfig) -> None:
    """Fill in the fingerprints of a task's local files."""
    task.apply_chat_template = task.apply_chat_template or None  # false is the default
    if task.key is not None and task.text is not None:
        task.filler = None
        task.fingerprint = content_digest(Path(task.text), digits=16) if Path(task.text).is_file() else None
    elif task.key is not None and task.filler.startswith("python_"):
        task.fingerprint = f"python-{platform.python_version()}"
    path, examples = data_path(task), fewshot_path(task)
    if path is not None and path.is_file():
        task.fingerprint = content_digest(path, digits=16)
    if examples is not None and examples.is_file():
        task.fewshot_fingerprint = content_digest(examples, digits=16)


def gguf_file(model: DictConfig) -> str | None:
    """Return the GGUF file to load: the given one, or that of the model's package if this is installed.

    The package has the weights that the configuration in ``conf/`` names: others are asked for by ``model.hub_id`` or
    ``model.revision``, and come from the hub.
    """
    if model.gguf is not None or model.path is not None or model.package is None or _names_other_weights(model):
        return model.gguf
    found = importlib.util.find_spec(model.package)  # does not import it
    for location in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return str(path)
    return None


def name_after_files(model: DictConfig, name: str) -> None:
    """Rename a model, and drop what belongs to the chosen one; values set on the command line stay."""
    if model.name in choices("model"):
        for key in MODEL_FILES:
            if key not in model.given:
                model[key] = None
        model.name = name


def _names_other_weights(model: DictConfig) -> bool:
    """Return whether the command line sets a repository of the hub, or a revision, other than the model's own."""
    chosen = _hub_source(model.name) if model.name in choices("model") else {}
    return any(key in model.given and model[key] != chosen.get(key) for key in HUB)


@functools.cache
def _hub_source(name: str) -> dict[str, Any]:
    """Return the repository and the revision of a model in ``conf/``."""
    chosen = compose_config([f"model={name}"]).model
    return {key: chosen[key] for key in HUB}


def check_profile(config: DictConfig) -> None:
    """Raise a ConfigError if ``method.profile`` is of other weights than the run's; the library checks its shape."""
    if config.method.get("profile") is None or config.model.random_init:
        return
    profiled = (read_json(_file_beside(config.method.profile, "profile.json")) or {}).get("model", {})
    # Compare the fingerprints, or the ids on the hub if there is one without fingerprint.
    for name, current in (("fingerprint", config.model.fingerprint), ("id", config.model.hub_id)):
        if None in (profiled.get(name), current):
            continue
        if profiled[name] != current:
            raise ConfigError(
                f"method.profile={config.method.profile} is of another model, {profiled.get('name')} ({name} "
                f"{profiled[name]}), than {config.model.name} ({current}); make one with experiment=profile"
            )
        return


def fingerprint_model(folder: Path) -> str:
    """Return a digest of configuration, tokenizer and weights."""
    suffixes = (".json", ".safetensors", ".bin", ".model")
    return fingerprint_files([path for path in sorted(folder.glob("*")) if path.suffix in suffixes])


def fingerprint_files(paths: list[Path]) -> str:
    """Return a digest of the files that exist; of a large one, 64 blocks spread over it."""
    total = hashlib.sha256()
    for path in filter(Path.is_file, paths):
        size = path.stat().st_size
        total.update(f"{path.name} {size} ".encode())
        last = size - BLOCK
        spread = [last * block // (BLOCKS - 1) for block in range(BLOCKS)]
        with open(path, "rb") as handle:
            for start in spread if last > BLOCKS * BLOCK else range(0, size, BLOCK):
                handle.seek(start)
                total.update(handle.read(BLOCK))
    return total.hexdigest()[:16]
