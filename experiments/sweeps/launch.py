"""Launch of sweeps: plan the jobs, record them, run them on their launcher."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from experiments.config.schema import ConfigError
from experiments.execute import run_config
from experiments.runs.code import current_code, snapshot
from experiments.sweeps.job import record_outcome
from experiments.sweeps.local import LocalLauncher
from experiments.sweeps.plan import PlannedJob, plan_jobs
from experiments.sweeps.record import Sweep, new_sweep_folder
from experiments.sweeps.slurm import SlurmLauncher
from experiments.system.console import log_error, log_info, logged_errors
from experiments.system.processes import is_main_process, world_size

#: Launchers of jobs in processes of their own, which run from a snapshot of the code.
LAUNCHERS = {"local": LocalLauncher, "slurm": SlurmLauncher}


def launch(sweeps: list[list[str]]) -> int:
    """Run the jobs of some sweeps as one; return the worst exit code. Nothing is written after a ConfigError."""
    planned = plan_jobs(sweeps)
    name, results_dir = planned[0].launcher, planned[0].config.results_dir
    if world_size() > 1 and name != "basic":
        raise ConfigError(f"hydra/launcher={name} starts jobs from one process, not from {world_size()}")
    launcher = LAUNCHERS[name](planned) if name in LAUNCHERS else None
    folder = new_sweep_folder(Path(results_dir))
    sweep = Sweep(folder.absolute(), name, [one.job for one in planned], results_dir=str(results_dir))
    if not is_main_process():
        return run_serially(planned, sweep, [])
    todo = [index for index, one in enumerate(planned) if not one.is_done]
    try:
        sweep.path.mkdir(parents=True)  # record the sweep before anything is started
        sweep.code = asdict(snapshot(sweep.path / "code") if launcher and todo else current_code())
        sweep.write()
    except OSError as error:
        if not isinstance(error, FileExistsError):  # else it belongs to a sweep launched at the same moment
            shutil.rmtree(sweep.path, ignore_errors=True)
        log_error(f"cannot record the sweep in {folder}: {error.strerror or error}")
        return 1
    runs = sum(len(one.folders) for one in planned)
    log_info(f"jobs: {len(planned)} ({len(planned) - len(todo)} already complete), runs: {runs}; recorded in {folder}")
    try:
        return launcher.run(sweep, todo) if launcher else run_serially(planned, sweep, todo)
    except ConfigError:
        shutil.rmtree(sweep.path, ignore_errors=True)
        raise


def run_serially(planned: list[PlannedJob], sweep: Sweep, todo: list[int]) -> int:
    """Run one job after the other in this process (``hydra/launcher=basic``); return the worst exit code.

    Jobs that are done are included, for their rows in the tables.
    """
    codes = []
    for index, one in enumerate(planned):
        one.config.logger.group = one.config.logger.group or sweep.path.name
        log_info(f"[{index + 1}/{len(planned)}] {' '.join(one.job.overrides)}")
        codes.append(run_config(one.config))
        if index in todo:
            record_outcome(sweep, index, codes[-1], logged_errors[-1] if codes[-1] and logged_errors else None)
    if set(codes) == {2} and is_main_process():  # nothing was run: leave nothing behind, not even the record
        shutil.rmtree(sweep.path, ignore_errors=True)
    return max(codes, default=0)
