"""From the sweeps of a command line to jobs: planned, recorded, started; and the exit code that sums them up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from experiments.config.schema import ConfigError
from experiments.runs.code import describe, snapshot
from experiments.sweeps import local, serial, slurm
from experiments.sweeps.record import Planned, Sweep, plan
from experiments.system.console import complain, say
from experiments.system.processes import is_main_process, world_size


class Launcher(Protocol):
    """Runs the jobs of a sweep."""

    def __call__(self, sweep: Sweep, todo: list[int]) -> int:
        """Run the jobs with these indices; returns the exit code."""


#: For each ``hydra/launcher`` what checks its settings and returns it, and whether its jobs need a snapshot.
LAUNCHERS: dict[str, tuple[Callable[[list[Planned]], Launcher], bool]] = {
    "basic": (serial.prepare, False),
    "local": (local.prepare, True),
    "slurm": (slurm.prepare, True),
}


def launch(sweeps: list[list[str]]) -> int:
    """Run the jobs of some sweeps as one; returns the worst exit code.

    Raises:
        ConfigError: settings that the launcher can't work with. Nothing is written then.
    """
    planned, folder = plan(sweeps)
    names = {one.launcher for one in planned}
    if len(names) > 1:
        raise ConfigError(f"one launcher for all jobs, please, not {', '.join(sorted(names))}")
    (name,) = names
    if world_size() > 1 and name != "basic":
        raise ConfigError(f"hydra/launcher={name} starts jobs from one process, not from {world_size()}")
    prepare, copies = LAUNCHERS[name]
    run = prepare(planned)
    sweep = Sweep(folder.absolute(), name, [one.job for one in planned], results_dir=str(planned[0].config.results_dir))
    if not is_main_process():
        return run(sweep, [])
    todo = [index for index, one in enumerate(planned) if not one.is_done]
    try:
        sweep.path.mkdir(parents=True)
        sweep.code = asdict(snapshot(sweep.path / "code") if copies and todo else describe())
        sweep.write()
    except OSError as error:
        shutil.rmtree(sweep.path, ignore_errors=True)
        complain(f"can't record the sweep in {folder}: {error.strerror or error}")
        return 1
    runs = sum(len(one.folders) for one in planned)
    say(f"jobs: {len(planned)} ({len(planned) - len(todo)} done already), runs: {runs}; recorded in {folder}")
    try:
        return run(sweep, todo)
    except ConfigError:
        shutil.rmtree(sweep.path, ignore_errors=True)
        raise
