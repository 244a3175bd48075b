"""Planning of sweeps: from the overrides of a command line to jobs that are not recorded yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config.compose import combinations, compose_config
from experiments.config.schema import ConfigError
from experiments.runs.folder import RunFolder
from experiments.runs.resolve import run_folders
from experiments.sweeps.record import Job


@dataclass
class PlannedJob:
    """A job with its runs, its configuration, and its launcher's name and settings."""

    job: Job
    folders: list[RunFolder]
    config: DictConfig
    launcher: str
    settings: DictConfig

    @property
    def is_done(self) -> bool:
        """True if all its runs are done and the job is not forced."""
        return not self.job.force and all(folder.is_done for folder in self.folders)


def plan_jobs(sweeps: list[list[str]]) -> list[PlannedJob]:
    """Return the jobs of some sweeps, without those whose runs all belong to earlier jobs."""
    planned: list[PlannedJob] = []
    seen: set[Path] = set()
    for overrides in (single for arguments in sweeps for single in combinations(arguments)):
        config = compose_config(overrides, with_hydra=True)
        settings, launcher = config.hydra.launcher, config.hydra.runtime.choices["hydra/launcher"]
        OmegaConf.resolve(settings)
        with open_dict(config):
            del config["hydra"]
        folders = run_folders(config)
        if seen.issuperset(folder.path for folder in folders):
            continue
        seen.update(folder.path for folder in folders)
        runs = [str(folder.path.relative_to(config.results_dir)) for folder in folders]
        planned.append(PlannedJob(Job(overrides, runs, force=config.force), folders, config, launcher, settings))
    if len({one.config.results_dir for one in planned}) > 1:
        raise ConfigError("results_dir cannot be a sweep; expected one results_dir=FOLDER")
    launchers = sorted({one.launcher for one in planned})
    if len(launchers) > 1:
        raise ConfigError(f"all jobs of a sweep must use one launcher, got {', '.join(launchers)}")
    return planned
