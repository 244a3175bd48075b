"""The record of a sweep: which jobs it has, which runs each of them stands for, and how each job ended.

``<results_dir>/sweeps/<time>/`` holds ``sweep.json``, written before anything is launched, and in ``jobs/`` an outcome
and a log of each job. Nothing here imports torch.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config.schema import ConfigError, combinations, compose_config
from experiments.runs.folder import RunFolder, read_json, write_json
from experiments.runs.resolve import run_folders

FOLDER = "sweeps"


@dataclass
class Job:
    """One combination of a sweep: one process, with a run for each of its tasks."""

    overrides: list[str]
    runs: list[str]  # their folders, below the results folder
    force: bool = False
    slurm_id: str | None = None


@dataclass
class Sweep:
    """What one command asked for."""

    path: Path  # its own folder
    launcher: str
    jobs: list[Job]
    cwd: str = field(default_factory=os.getcwd)  # what relative paths are relative to
    results_dir: str = "results"
    created: float = field(default_factory=time.time)  # seconds since 1970
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    code: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Write ``sweep.json``.

        Raises:
            OSError: it can't be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "sweep.json", {**asdict(self), "path": str(self.path)})

    @property
    def results(self) -> Path:
        """The results folder, which may have moved since together with this record."""
        return self.path.parent.parent

    def client_lives(self) -> bool:
        """Whether the process that launched the sweep is still there; on another machine nobody can tell."""
        if self.host != socket.gethostname():
            return False
        return psutil.pid_exists(self.pid) and psutil.Process(self.pid).create_time() <= self.created

    def outcome_path(self, index: int) -> Path:
        """Where a job's process leaves how it ended."""
        return self.path / "jobs" / f"{index}.json"

    def log_path(self, index: int) -> Path:
        """Where a local job's process writes its lines; Slurm's own logs are in ``slurm/``."""
        return self.path / "jobs" / f"{index}.log"


@dataclass
class Planned:
    """A job that isn't recorded yet, with what its launcher was told."""

    job: Job
    folders: list[RunFolder]
    config: DictConfig
    launcher: str
    settings: DictConfig

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return not self.job.force and all(folder.is_done for folder in self.folders)


def plan(sweeps: list[list[str]]) -> tuple[list[Planned], Path]:
    """The jobs of some sweeps, each once, and the folder for their record, which is free.

    Raises:
        ConfigError: jobs that differ in what holds for all of a sweep.
    """
    found: list[Planned] = []
    seen: set[Path] = set()
    for overrides in (single for arguments in sweeps for single in combinations(arguments)):
        config = compose_config(overrides, with_hydra=True)
        settings, launcher = config.hydra.launcher, config.hydra.runtime.choices["hydra/launcher"]
        OmegaConf.resolve(settings)
        with open_dict(config):
            del config["hydra"]
        folders = run_folders(config)
        if seen.issuperset(run.path for run in folders):
            continue
        seen.update(run.path for run in folders)
        runs = [str(run.path.relative_to(config.results_dir)) for run in folders]
        found.append(Planned(Job(overrides, runs, force=config.force), folders, config, launcher, settings))
    if len({one.config.results_dir for one in found}) > 1:
        raise ConfigError("results_dir can't be a sweep; expected one results_dir=FOLDER")
    base, number = Path(found[0].config.results_dir, FOLDER, time.strftime("%Y-%m-%d_%H-%M-%S")), 1
    folder = base
    while folder.exists():  # launched within the same second
        number += 1
        folder = base.with_name(f"{base.name}_{number}")
    return found, folder


def read_sweep(path: Path) -> Sweep | None:
    """A sweep's record; ``None`` where there is none that can be read."""
    raw = read_json(path / "sweep.json")
    if raw is None:
        return None
    try:
        return Sweep(**{**raw, "path": path, "jobs": [Job(**job) for job in raw["jobs"]]})
    except (KeyError, TypeError):
        return None


def read_sweeps(results_dir: Path) -> list[Sweep]:
    """All records of a results folder, the oldest first."""
    found = [read_sweep(path.parent) for path in (results_dir / FOLDER).glob("*/sweep.json")]
    return sorted((sweep for sweep in found if sweep is not None), key=lambda sweep: sweep.created)
