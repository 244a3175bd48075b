"""The launching client while jobs run elsewhere: one line per run as it ends, judged by the run's own status."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from experiments.runs.files import read_json
from experiments.runs.state import RunState, run_state
from experiments.sweeps.record import Sweep
from experiments.system.console import log_info


def monitor_runs(sweep: Sweep, todo: list[int], job_states: Callable[[], dict[int, str]], pause_s: float = 0.5) -> int:
    """Log how runs end until all have ended; return 0 if all are done, else 1.

    Args:
        sweep: of the jobs.
        todo: indices of the jobs.
        job_states: returns the state of each job: PENDING, RUNNING, or how it ended if that is known.
        pause_s: seconds between two looks.
    """
    left = {(index, name) for index in todo for name in sweep.jobs[index].runs}
    total, failed = len(left), 0
    while left:
        states = job_states()
        for index, name in sorted(left):
            folder, job = sweep.results / name, sweep.jobs[index]
            active = states.get(index) in ("PENDING", "RUNNING")
            state = run_state(folder, read_json(sweep.outcome_path(index)), None if active else states.get(index))
            # A forced run may still have the result of an earlier sweep.
            stale = job.force and (state.started or 0.0) < sweep.created
            if active and (state.state != "done" or stale):
                continue
            left.discard((index, name))
            failed += state.state != "done"
            log_info(f"[{total - len(left)}/{total}] {_describe(name, folder, state)}")
        if left:
            time.sleep(pause_s)
    if failed:
        log_info(f"{failed} of {total} runs are not done; for the reasons: {status_command(sweep)} --failed")
    return 1 if failed else 0


def detach_on_hangup() -> None:
    """Keep running without a terminal when it is closed."""

    def detach(number: int, frame: FrameType | None) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            with suppress(OSError):
                os.dup2(null, descriptor)

    with suppress(ValueError):  # only the main thread can set handlers
        signal.signal(signal.SIGHUP, detach)


def _describe(name: str, folder: Path, state: RunState) -> str:
    """Return a run's state with its score and time, or with the reason."""
    result = read_json(folder / "result.json") or {}
    metric = result.get("metric")
    score = f"{metric} {result['metrics'][metric]:.4f}, " if metric in result.get("metrics", {}) else ""
    note = f"{score}{state.seconds or 0.0:.0f} s" if state.state == "done" else state.reason
    return f"{state.state}: {name}{f' ({note})' if note else ''}"


def status_command(sweep: Sweep) -> str:
    """Return the command that shows the states of a sweep's runs."""
    place = "" if sweep.results_dir == "results" else f" results_dir={sweep.results_dir}"
    return f"python -m experiments.status{place}"
