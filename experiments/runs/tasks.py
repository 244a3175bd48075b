"""The single tasks of a configuration, and their local data files."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from experiments.config.schema import load_member


def members(config: DictConfig) -> list[DictConfig]:
    """Return the configuration of each single task: the configuration itself, or one for each member of its group."""
    if not config.task.members:
        return [config]
    singles = []
    for name in config.task.members:
        single = config.copy()
        single.task = load_member(name, config.task)
        singles.append(single)
    return singles


def data_path(task: DictConfig) -> Path | None:
    """Return the local file of the task's items; ``None`` when they come from the hub."""
    return Path(task.data_dir, task.data_file) if task.data_dir is not None else None
