"""Structured configuration: the keys of ``conf/``, their types and defaults.

``experiment`` and ``method`` have the types of the dataclasses that they become in :func:`validate.to_dataclass`.
Nothing in this package imports torch, so that ``python run.py --help`` and mistakes are reported at once.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parents[2]
CONF = REPOSITORY / "conf"

# OmegaConf's structured configurations have no Literal type, so choices are listed here and checked in validate.py.
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
LOGGER_MODES = ("online", "offline", None)
PYTHON_TEXTS = ("docs", "code", "packages")
KEYS = ("digits", "word", "sentence")
FILLERS = ("sentences", "python_docs", "python_code")


class ConfigError(ValueError):
    """Invalid name or value in the configuration; exits with 2 and writes nothing. The message is one line."""


@dataclass
class Resources:
    """Resources of a queued job (``hydra/launcher=slurm``)."""

    gpus: int = 1
    cpus: int = 8
    mem_gb: int = 64  # GiB of main memory
    timeout_min: int = 240  # a job that needs longer is requeued and resumes from what it saved


@dataclass
class ModelConfig:
    """Location of a model's weights, how to load them, and the architecture to build without them."""

    name: str = "???"
    hub_id: str | None = None
    revision: str = "main"
    path: str | None = None  # local folder in Hugging Face format, used instead of the hub
    gguf: str | None = None  # local GGUF file, used instead of `path` and the hub
    package: str | None = None  # Python package with a GGUF file, used instead of the hub where it is installed
    dtype: str = "auto"  # one of DTYPES
    device_map: Any = None  # null: all on `device`; one of DEVICE_MAPS; or a dictionary from modules to devices
    safetensors_only: bool = True  # refuse pickled weights
    random_init: bool = False  # build `architecture` with random weights (for benchmarks; accuracy is meaningless)
    clusters: Any = None  # default of `method.clusters`
    predictor: str | None = None  # folder of a trained predictor, default of `method.predictor`
    profile: str | None = None  # folder of a head profile, default of `method.profile`
    architecture: dict[str, Any] = field(default_factory=dict)  # used by random_init
    resources: Resources = field(default_factory=Resources)
    fingerprint: str | None = None  # of the weights at `path`; filled in
    given: list[str] = field(default_factory=list)  # keys of this section that the command line sets; filled in


@dataclass
class TaskConfig:
    """A task of lm-evaluation-harness, or a group of tasks (``members``) with one run each.

    A ``registered`` task is one that lm-eval knows by its name, from its own folder or from ``include_path``; a group
    or tag of lm-eval is one run for each of its tasks. A task with a ``key`` is made here, for the model's tokenizer.
    """

    name: str = "???"
    members: list[str] = field(default_factory=list)
    harness: str | None = None  # file below lm_eval/tasks with the prompts, choices and scoring
    metric: str | None = "acc"  # null: the first of the definition
    split: str = "test"
    data_file: str | None = None
    data_dir: str | None = None  # folder with `data_file`; null: the hub
    columns: list[str] = field(default_factory=list)  # required in each item of local data
    fingerprint: str | None = None  # of the data file; filled in
    num_fewshot: int | None = 0  # null: that of the definition
    registered: bool | None = None
    include_path: str | None = None  # folder with definitions, which override lm-eval's of the same name
    overrides: Any = None  # dictionary of the definition's keys that its group or the user sets
    fewshot_file: str | None = None  # in data_dir, with the few-shot examples; null: NAME_train.jsonl
    fewshot_fingerprint: str | None = None  # of that file, where it is used; filled in
    apply_chat_template: bool | None = None  # prompts in the format of the tokenizer's chat template
    key: str | None = None  # one of KEYS: what is hidden in the filler and asked for; null: not such a task
    filler: str | None = None  # one of FILLERS
    text: str | None = None  # text file, used instead of `filler`
    lengths: list[int] | None = None  # of the prompts, in tokens of the model
    depths: list[float] | None = None  # of the key: 0 is the start of the filler, 1 its end
    items_per_cell: int | None = None  # for each length and depth
    seed: int | None = None  # of the items


@dataclass
class CorpusConfig:
    """Source of texts: `path` is preferred to `python` and the hub, and these to the embedded generator."""

    name: str = "???"
    path: str | None = None  # .jsonl with `column` in each line, or any other file with one text per line
    hub_id: str | None = None
    revision: str = "main"
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    python: str | None = None  # texts of the running Python's own installation: one of PYTHON_TEXTS
    joined: bool | None = None  # perplexity: all texts are one document; null: those of a text file, not of JSONL
    fingerprint: str | None = None  # of the file at `path`; filled in


@dataclass
class LoggerConfig:
    """Experiment tracker that finished runs are uploaded to (:mod:`experiments.runs.tracking`)."""

    name: str = "???"
    project: str = "chai-lab"
    entity: str | None = None  # null: the account's default
    group: str | None = None  # null: the start time of the sweep, for the runs of a sweep
    mode: str | None = None  # one of LOGGER_MODES; null: WANDB_MODE, else online with an API key and a network
    timeout: float = 120.0  # seconds to wait for the tracker


@dataclass
class RunConfig:
    """Top-level run configuration; ``profile`` and ``corpus`` are null for experiments without them."""

    experiment: Any = field(default_factory=dict)
    method: Any = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    profile: Any = None
    corpus: CorpusConfig | None = None
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0
    limit: Any = None  # number of items, or the fraction of them below 1
    batch_size: Any = 16  # or auto, by the memory of the device
    device: str = "auto"
    force: bool = False
    results_dir: str = "results"


@functools.cache
def register() -> None:
    """Register the schemas and the ``repo`` resolver (a path inside the repository) with Hydra; idempotent."""
    nodes = {None: RunConfig, "model": ModelConfig, "task": TaskConfig, "corpus": CorpusConfig, "logger": LoggerConfig}
    for group, node in nodes.items():
        ConfigStore.instance().store(group=group, name="schema", node=node)
    OmegaConf.register_new_resolver("repo", lambda path: str(REPOSITORY / path), replace=True)


def unknown_name(kind: str, name: object, valid: Sequence[str]) -> str:
    """Return a message like ``unknown method 'chia' (did you mean 'chai'?); valid: chai, mha``."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown {kind} '{name}'{hint}; valid: {', '.join(valid)}"
