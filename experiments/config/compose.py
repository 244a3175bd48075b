"""Composition: from a list of overrides to configurations, and from a group of tasks to its members."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from experiments.config.schema import CONF, ConfigError, TaskConfig, register, unknown_name

#: Hydra's own groups that can be chosen; ``basic`` is Hydra's name for running jobs one after the other.
HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")


def choices(group: str) -> list[str]:
    """Return the names that ``group=`` accepts."""
    names = [path.stem for path in (CONF / group).glob("*.yaml")]
    return sorted([*names, "basic"] if group in HYDRA_GROUPS else names)


def groups() -> list[str]:
    """Return the project's configuration groups, including ``paper``, whose files are lists of sweeps."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def compose_config(overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose the configuration of one list of overrides; ``with_hydra`` keeps its ``hydra`` section."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=with_hydra)


def combinations(arguments: list[str]) -> list[list[str]]:
    """Return the overrides of each combination of a sweep, in the order of Hydra's basic sweeper."""
    values: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(arguments):
        key = override.get_key_element()
        if override.is_sweep_override():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
    return [list(combination) for combination in itertools.product(*values.values())]


def task_members(config: DictConfig) -> list[DictConfig]:
    """Return one configuration per single task: the given one, or one for each member of its group.

    Raises:
        ConfigError: unknown member.
    """
    if not config.task.members:
        return [config]
    singles = []
    for name in config.task.members:
        single = config.copy()
        single.task = load_member(name, config.task)
        singles.append(single)
    return singles


def load_member(name: str, group: DictConfig | TaskConfig) -> DictConfig:
    """Return the configuration of one member of a group; ``data_dir`` and ``num_fewshot`` of the group apply to it."""
    if name not in choices("task"):
        raise ConfigError(unknown_name("task", name, choices("task")))
    member = _compose_task(name).copy()
    if group.data_dir is not None:
        member.data_dir = group.data_dir
    if group.num_fewshot:
        member.num_fewshot = group.num_fewshot
    return member


@functools.cache
def _compose_task(name: str) -> DictConfig:
    return compose_config([f"task={name}"]).task


def data_path(task: DictConfig) -> Path | None:
    """Return the local file of a task's items, or ``None`` if they come from the hub."""
    return Path(task.data_dir, task.data_file) if task.data_dir is not None else None
