"""Which runs a configuration stands for, and in which folders: known before anything heavy is imported."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from experiments.config.schema import TaskConfig
from experiments.runs.folder import RunFolder
from experiments.runs.identity import settle_identity
from experiments.runs.tasks import members

#: Experiments that aren't about the method chosen, and what their folders have in its place.
METHOD = {"profile": "none", "train_dejavu": "dejavu"}


def settled(config: DictConfig) -> list[DictConfig]:
    """The configuration of each run, as its identity counts it: an experiment drops what its runs don't depend on.

    Raises:
        ConfigError: a group of tasks has a member that there isn't.
    """
    config, name = config.copy(), config.experiment.name
    if name == "pretrain_tiny":
        return [config]
    if name == "accuracy":
        singles = members(config)
        for single in singles:
            settle_identity(single)
        return singles
    config.task = OmegaConf.structured(TaskConfig(name="none"))
    if name in METHOD:
        config.method = OmegaConf.create({"name": METHOD[name]})
    settle_identity(config)
    if name == "profile":
        config.task.name = config.corpus.name
    return [config]


def run_folders(config: DictConfig) -> list[RunFolder]:
    """The folders of a configuration's runs, whether they are there or not."""
    return [RunFolder(single) for single in settled(config)]
