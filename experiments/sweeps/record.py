"""Record of a sweep: its jobs, the runs of each job, and how each job ended.

``<results_dir>/sweeps/<time>/`` holds ``sweep.json``, written before anything is launched, and in ``jobs/`` an outcome
and a log per job. Nothing here imports torch.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.runs.files import read_json, write_json

FOLDER = "sweeps"


@dataclass
class Job:
    """One combination of a sweep: one process, with a run for each of its tasks."""

    overrides: list[str]
    runs: list[str]  # their folders, relative to the results folder
    force: bool = False
    slurm_id: str | None = None


@dataclass
class Sweep:
    """The jobs of one command."""

    path: Path  # folder of this record
    launcher: str
    jobs: list[Job]
    cwd: str = field(default_factory=os.getcwd)  # base of relative paths
    results_dir: str = "results"
    created: float = field(default_factory=time.time)  # seconds since 1970
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    code: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Write ``sweep.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "sweep.json", {**asdict(self), "path": str(self.path)})

    @property
    def results(self) -> Path:
        """Results folder, which may have been moved together with this record."""
        return self.path.parent.parent

    @property
    def status_command(self) -> str:
        """Command that shows the states of the runs."""
        place = "" if self.results_dir == "results" else f" results_dir={self.results_dir}"
        return f"python -m experiments.status{place}"

    def is_client_alive(self) -> bool:
        """Return whether the launching process is alive; ``False`` on another machine, where that is unknown."""
        if self.host != socket.gethostname():
            return False
        import psutil  # here, since the command line imports this module and --help need not wait for it

        return psutil.pid_exists(self.pid) and psutil.Process(self.pid).create_time() <= self.created

    def outcome_path(self, index: int) -> Path:
        """Return the path of a job's outcome."""
        return self.path / "jobs" / f"{index}.json"


def new_sweep_folder(results_dir: Path) -> Path:
    """Return a folder for a new record, which does not exist yet."""
    base = folder = results_dir / FOLDER / time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while folder.exists():  # launched within the same second
        number += 1
        folder = base.with_name(f"{base.name}_{number}")
    return folder


def read_sweep(path: Path) -> Sweep | None:
    """Read a sweep's record; ``None`` if there is none that can be read."""
    try:
        raw = read_json(path / "sweep.json") or {}
        return Sweep(**{**raw, "path": path, "jobs": [Job(**job) for job in raw["jobs"]]})
    except (KeyError, TypeError):
        return None


def read_sweeps(results_dir: Path) -> list[Sweep]:
    """Read all records of a results folder, oldest first."""
    sweeps = [read_sweep(path.parent) for path in (results_dir / FOLDER).glob("*/sweep.json")]
    return sorted((sweep for sweep in sweeps if sweep is not None), key=lambda sweep: sweep.created)
