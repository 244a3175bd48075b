"""Runs of a configuration and their folders, known before anything heavy is imported."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from experiments.config.compose import task_members
from experiments.config.schema import TaskConfig
from experiments.runs.folder import RunFolder
from experiments.runs.identity import resolve_fingerprints
from experiments.runs.registry import registered_members

#: Experiments that do not depend on the chosen method, and the name in place of it in their folders.
METHOD = {"profile": "none", "ablations": "none", "train_dejavu": "dejavu"}


def resolve_runs(config: DictConfig) -> list[DictConfig]:
    """Return one configuration per run, without what the experiment's runs do not depend on."""
    config, name = config.copy(), config.experiment.name
    if name == "pretrain_tiny":
        return [config]
    if name == "accuracy":
        if config.task.registered:
            return registered_members(config)
        singles = task_members(config)
        for single in singles:
            resolve_fingerprints(single)
        return singles
    config.task = OmegaConf.structured(TaskConfig(name="none"))
    if name in METHOD:
        config.method = OmegaConf.create({"name": METHOD[name]})
    resolve_fingerprints(config)
    if name in ("profile", "perplexity", "ablations"):
        config.task.name = config.corpus.name
    return [config]


def run_folders(config: DictConfig) -> list[RunFolder]:
    """Return the folders of a configuration's runs, whether they exist or not."""
    return [RunFolder(single) for single in resolve_runs(config)]
