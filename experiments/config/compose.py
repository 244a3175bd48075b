"""Composition: from a list of overrides to configurations, and from a group of tasks to its members."""

from __future__ import annotations

import functools
import itertools
import pickle
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config.schema import CONF, ConfigError, register, unknown_name

#: Hydra's own groups that can be chosen; ``basic`` is Hydra's name for running jobs one after the other.
HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")
#: Keys with a path of the user, in which ``~`` is the home folder.
PATHS = (
    "results_dir", "model.path", "model.gguf", "model.predictor", "model.profile", "method.predictor", "method.profile",
    "task.data_dir", "task.include_path", "task.fewshot_file", "task.text", "corpus.path", "experiment.corpus",
)  # fmt: skip


def choices(group: str) -> list[str]:
    """Return the names that ``group=`` accepts."""
    names = [path.stem for path in (CONF / group).glob("*.yaml")]
    return sorted([*names, "basic"] if group in HYDRA_GROUPS else names)


def groups() -> list[str]:
    """Return the project's configuration groups, including ``paper``, whose files are lists of sweeps."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def compose_config(overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose the configuration of one list of overrides; ``with_hydra`` keeps its ``hydra`` section."""
    selections = {*groups(), *HYDRA_GROUPS}
    # As Hydra applies them. One key for what check and run write in different orders.
    ordered = sorted(overrides, key=lambda override: override.partition("=")[0] not in selections)
    config = expand_home(pickle.loads(_compose(tuple(ordered))))
    if not with_hydra:
        with open_dict(config):
            del config["hydra"]
    mark_given(config, overrides)
    return config


@functools.lru_cache(maxsize=1024)
def _compose(overrides: tuple[str, ...]) -> bytes:
    """Compose with Hydra, which takes 0.1 s, and pickle, since a command checks, plans and runs one configuration."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return pickle.dumps(compose("config", list(overrides), return_hydra_config=True))


def mark_given(config: DictConfig, overrides: list[str]) -> None:
    """Fill in ``model.given``: a value of the user is kept where a default belongs to other weights."""
    keys = [override.partition("=")[0].lstrip("+~").split(".") for override in overrides]
    config.model.given = sorted({rest[0] for section, *rest in keys if section == "model" and rest})


def expand_home(config: DictConfig) -> DictConfig:
    """Expand ``~`` in the paths of a configuration, in place."""
    for key in PATHS:
        section, _, name = key.rpartition(".")
        node = OmegaConf.select(config, section) if section else config
        if isinstance(node, DictConfig) and name in node and not OmegaConf.is_interpolation(node, name):
            value = OmegaConf.select(config, key)
            if isinstance(value, str) and value.startswith("~"):
                node[name] = str(Path(value).expanduser())
    return config


def values(override: Override) -> list[str]:
    """Return the values of an override as text, several for a sweep."""
    if not override.is_sweep_override():
        return [str(override.get_value_element_as_str())]
    try:
        return [str(value) for value in override.sweep_string_iterator()]
    except HydraException:
        raise ConfigError(f"cannot list the values of {override.input_line}; write them out: a,b,c") from None


def variants(override: Override) -> list[str]:
    """Return the override with each of its values."""
    return [f"{override.get_key_element()}={value}" for value in values(override)]


def combinations(arguments: list[str]) -> list[list[str]]:
    """Return the overrides of each combination of a sweep, in the order of Hydra's basic sweeper."""
    parsed = OverridesParser.create().parse_overrides(arguments)
    by_key = {override.get_key_element(): variants(override) for override in parsed}  # the last one counts
    return [list(combination) for combination in itertools.product(*by_key.values())]


def task_members(config: DictConfig) -> list[DictConfig]:
    """Return one configuration per single task: the given one, or one for each member of its group."""
    group = config.task
    singles = [config] if not group.members else []
    for name in group.members:
        if name not in choices("task"):
            raise ConfigError(unknown_name("task", name, choices("task")))
        single = config.copy()
        single.task = _compose_task(name).copy()
        if group.data_dir is not None:
            single.task.data_dir = group.data_dir
        if group.num_fewshot:
            single.task.num_fewshot = group.num_fewshot
        if group.apply_chat_template:
            single.task.apply_chat_template = True
        singles.append(single)
    return singles


@functools.cache
def _compose_task(name: str) -> DictConfig:
    return compose_config([f"task={name}"]).task


def data_path(task: DictConfig) -> Path | None:
    """Return the local file of a task's items, or ``None`` if they come from the hub, or from a file per split."""
    return Path(task.data_dir, task.data_file) if task.data_dir is not None and task.data_file is not None else None


def fewshot_path(task: DictConfig) -> Path | None:
    """Return the local file of a task's few-shot examples, or ``None`` if it needs none."""
    if data_path(task) is None or not task.num_fewshot:
        return None
    return Path(task.data_dir, task.fewshot_file or f"{task.name}_train.jsonl")


def split_path(task: DictConfig, split: str) -> Path:
    """Return the local file of a split of a registered task: ``gsm8k_test.jsonl`` in ``task.data_dir``."""
    return Path(task.data_dir, f"{task.name}_{split}.jsonl")
