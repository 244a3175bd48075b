"""One job of a sweep as a process of its own: ``python -m experiments.sweeps.job SWEEP INDEX``, from a snapshot.

It goes to the folder that the sweep was launched from, composes its configuration and runs the experiment. How it ended
is written to the sweep's folder, for what can't get into a run's own ``status.json``: a configuration that a method
refuses, a results disk that is full, a process that was killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, open_dict

from experiments.runs.folder import RunFolder, read_json, write_json
from experiments.sweeps.record import Sweep, read_sweep
from experiments.system.console import complaints


def main(arguments: list[str]) -> int:
    """Do the job; returns the exit code of its experiment."""
    folder, index = Path(arguments[0]), int(arguments[1])
    sweep = read_sweep(folder)
    if sweep is None:
        print(f"error: no record of a sweep in {folder}", file=sys.stderr)
        return 1
    from experiments.cli import attempt
    from experiments.config.schema import compose_config
    from experiments.runs.resolve import run_folders

    os.chdir(sweep.cwd)
    sweep.outcome_path(index).unlink(missing_ok=True)
    started = time.time()
    config = compose_config(sweep.jobs[index].overrides)
    config.logger.group = config.logger.group or sweep.path.name
    codes = []
    error = None
    for part in resumable(config, run_folders(config), sweep.created):
        try:
            code, told = attempt(part)
        except SystemExit as end:
            note_outcome(sweep, index, int(end.code or 0), "interrupted", started)
            raise
        codes.append(code)
        error = error or told or (complaints[-1] if code and complaints else None)
    note_outcome(sweep, index, max(codes), error, started)
    return max(codes)


def resumable(config: DictConfig, folders: list[RunFolder], launched: float) -> list[DictConfig]:
    """``force=true`` holds once: what this sweep began before its job was queued again is gone on with."""
    begun = [
        folder
        for folder in folders
        if float((read_json(folder.path / "status.json") or {}).get("started") or 0) > launched
    ]
    if not config.force or not begun:
        return [config]
    parts = []
    for chosen, force in ((begun, False), ([folder for folder in folders if folder not in begun], True)):
        if chosen:
            part = config.copy()
            with open_dict(part):
                part.force = force
                if part.task.members:
                    part.task.members = [folder.config.task.name for folder in chosen]
            parts.append(part)
    return parts


def note_outcome(sweep: Sweep, index: int, code: int, error: str | None, started: float | None = None) -> None:
    """Record how a job ended; the runs' own states matter more, so a sweep's folder that is full is no failure."""
    outcome = {"code": code, "error": error, "started": started, "ended": time.time(), "host": socket.gethostname()}
    try:
        sweep.outcome_path(index).parent.mkdir(exist_ok=True)
        write_json(sweep.outcome_path(index), outcome)
    except OSError as failure:
        print(f"error: can't record how job {index} ended: {failure}", file=sys.stderr)


def note_death(sweep: Sweep, index: int, code: int, started: float) -> None:
    """Record the end of a process that couldn't do it itself.

    Args:
        sweep: with the job.
        index: of the job.
        code: as of :class:`subprocess.Popen`, negative for a signal.
        started: when it was started.
    """
    if (read_json(sweep.outcome_path(index)) or {}).get("ended", 0.0) >= started:
        return
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        note_outcome(sweep, index, code, f"killed by {name}{hint}", started)
    else:
        note_outcome(sweep, index, code or 1, f"its process ended with exit code {code}; see its log", started)


def start(
    sweep: Sweep, index: int, environment: dict[str, str] | None = None, **more: object
) -> subprocess.Popen[bytes]:
    """Start a job's process from the sweep's snapshot.

    Args:
        sweep: with the job.
        index: of the job.
        environment: to be set beside this process's own.
        more: of :class:`subprocess.Popen`.
    """
    command = [sys.executable, "-u", "-m", "experiments.sweeps.job", str(sweep.path.resolve()), str(index)]
    return subprocess.Popen(  # type: ignore[call-overload]
        command, cwd=sweep.path / "code", env={**os.environ, **(environment or {})}, **more
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
