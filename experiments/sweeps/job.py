"""One job of a sweep as a process of its own: ``python -m experiments.sweeps.job SWEEP INDEX``, from a snapshot.

It runs its configuration in the folder that the sweep was launched from. Its outcome goes to the sweep's folder, for
errors that cannot be in a run's own ``status.json``: a refused configuration, a full disk, a killed process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from experiments.config.compose import compose_config
from experiments.execute import run_config
from experiments.runs.files import read_json, write_json
from experiments.runs.folder import RunFolder
from experiments.runs.resolve import run_folders
from experiments.sweeps.record import Sweep, read_sweep
from experiments.system.console import logged_errors

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def main(arguments: list[str]) -> int:
    """Run the job; return the exit code of its experiment."""
    folder, index = Path(arguments[0]), int(arguments[1])
    sweep = read_sweep(folder)
    if sweep is None:
        print(f"error: no record of a sweep in {folder}", file=sys.stderr)
        return 1
    os.chdir(sweep.cwd)
    sweep.outcome_path(index).unlink(missing_ok=True)
    started = time.time()
    config = compose_config(sweep.jobs[index].overrides)
    config.logger.group = config.logger.group or sweep.path.name
    code, error = 0, None
    for part in split_forced(config, run_folders(config), sweep.created):
        try:
            part_code = run_config(part)
        except SystemExit as end:
            record_outcome(sweep, index, int(end.code or 0), "interrupted", started)
            raise
        code = max(code, part_code)
        error = error or (logged_errors[-1] if part_code and logged_errors else None)
    record_outcome(sweep, index, code, error, started)
    return code


def split_forced(config: DictConfig, folders: list[RunFolder], launched: float) -> list[DictConfig]:
    """Return the parts of a job, with ``force`` only for the runs that have not begun since the sweep was launched.

    A requeued job thus resumes what it began itself. ``launched`` is in seconds since 1970.
    """
    started = {folder: (read_json(folder.path / "status.json") or {}).get("started") or 0.0 for folder in folders}
    begun = [folder for folder in folders if config.force and started[folder] > launched]
    if not begun:
        return [config]
    parts = []
    for selected, force in ((begun, False), ([folder for folder in folders if folder not in begun], True)):
        if selected:
            part = config.copy()
            part.force = force
            if part.task.members:
                part.task.members = [folder.config.task.name for folder in selected]
            parts.append(part)
    return parts


def record_outcome(sweep: Sweep, index: int, code: int, error: str | None, started: float | None = None) -> None:
    """Record how a job ended; a failure to write it is printed only, since the runs' own states matter more."""
    outcome = {"code": code, "error": error, "started": started, "ended": time.time(), "host": socket.gethostname()}
    try:
        sweep.outcome_path(index).parent.mkdir(exist_ok=True)
        write_json(sweep.outcome_path(index), outcome)
    except OSError as failure:
        print(f"error: cannot record the outcome of job {index}: {failure}", file=sys.stderr)


def record_death(sweep: Sweep, index: int, code: int, started: float) -> None:
    """Record the end of a job's process (``code`` is negative for a signal), unless the process has done so itself."""
    if (read_json(sweep.outcome_path(index)) or {}).get("ended", 0.0) >= started:
        return
    error = f"its process ended with exit code {code}; see its log"
    if code < 0:
        name = signal.Signals(-code).name
        error = f"killed by {name}" + ("; out of memory?" if name == "SIGKILL" else "")
    record_outcome(sweep, index, code or 1, error, started)


def start_job(sweep: Sweep, index: int, environment: dict[str, str], **options: object) -> subprocess.Popen[bytes]:
    """Start a job's process from the sweep's snapshot, with ``environment`` added and options of ``Popen``."""
    command = [sys.executable, "-u", "-m", "experiments.sweeps.job", str(sweep.path.resolve()), str(index)]
    return subprocess.Popen(command, cwd=sweep.path / "code", env={**os.environ, **environment}, **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
