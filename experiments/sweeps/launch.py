"""Launch of sweeps: plan the jobs, record them, run them on their launcher."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from experiments.config.schema import ConfigError
from experiments.runs.code import current_code, snapshot
from experiments.sweeps.local import LocalLauncher
from experiments.sweeps.plan import plan_jobs
from experiments.sweeps.record import Sweep, new_sweep_folder
from experiments.sweeps.serial import SerialLauncher
from experiments.sweeps.slurm import SlurmLauncher
from experiments.system.console import log_error, log_info
from experiments.system.processes import is_main_process, world_size

#: Class of each choice of ``hydra/launcher``. All are made from the planned jobs, with a ConfigError for settings that
#: they cannot work with; ``run`` runs the jobs with the given indices, from a snapshot of the code if they need one.
LAUNCHERS = {"basic": SerialLauncher, "local": LocalLauncher, "slurm": SlurmLauncher}


def launch(sweeps: list[list[str]]) -> int:
    """Run the jobs of some sweeps as one; return the worst exit code.

    Raises:
        ConfigError: settings that the launcher cannot work with. Nothing is written then.
    """
    planned = plan_jobs(sweeps)
    name, results_dir = planned[0].launcher, planned[0].config.results_dir
    if world_size() > 1 and name != "basic":
        raise ConfigError(f"hydra/launcher={name} starts jobs from one process, not from {world_size()}")
    launcher = LAUNCHERS[name](planned)
    folder = new_sweep_folder(Path(results_dir))
    sweep = Sweep(folder.absolute(), name, [one.job for one in planned], results_dir=str(results_dir))
    if not is_main_process():
        return launcher.run(sweep, [])
    # Record the sweep before anything is started.
    todo = [index for index, one in enumerate(planned) if not one.is_done]
    try:
        sweep.path.mkdir(parents=True)
        sweep.code = asdict(snapshot(sweep.path / "code") if launcher.needs_snapshot and todo else current_code())
        sweep.write()
    except OSError as error:
        shutil.rmtree(sweep.path, ignore_errors=True)
        log_error(f"cannot record the sweep in {folder}: {error.strerror or error}")
        return 1
    runs = sum(len(one.folders) for one in planned)
    log_info(f"jobs: {len(planned)} ({len(planned) - len(todo)} already complete), runs: {runs}; recorded in {folder}")
    try:
        return launcher.run(sweep, todo)
    except ConfigError:
        shutil.rmtree(sweep.path, ignore_errors=True)
        raise
