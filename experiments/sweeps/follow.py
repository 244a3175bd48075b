"""The launching client while jobs run elsewhere: one line for each run as it ends, judged by the run's own status."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from experiments.runs.folder import read_json
from experiments.runs.state import RunState, run_state
from experiments.sweeps.record import Sweep
from experiments.system.console import say


def follow(sweep: Sweep, todo: list[int], active: Callable[[], dict[int, str]], pause_s: float = 0.5) -> int:
    """Tell how runs end until none is left; returns 0 if all are done, else 1.

    Args:
        sweep: with the jobs.
        todo: the indices of those to follow.
        active: the indices of jobs that haven't ended, and what became of others where it is known.
        pause_s: seconds between two looks.
    """
    left = {(index, name) for index in todo for name in sweep.jobs[index].runs}
    total, failed = len(left), 0
    while left:
        states = active()
        for index, name in sorted(left):
            folder, job = sweep.results / name, sweep.jobs[index]
            going = states.get(index) in ("PENDING", "RUNNING")
            state = run_state(folder, read_json(sweep.outcome_path(index)), None if going else states.get(index))
            stale = job.force and (state.started or 0.0) < sweep.created
            if going and (state.state != "done" or stale):
                continue
            left.discard((index, name))
            failed += state.state != "done"
            say(f"[{total - len(left)}/{total}] {line(name, folder, state)}")
        if left:
            time.sleep(pause_s)
    if failed:
        say(f"{failed} of {total} runs aren't done: python -m experiments.status{_where(sweep)} --failed tells why")
    return 1 if failed else 0


def line(name: str, folder: Path, state: RunState) -> str:
    """How one run ended."""
    result = read_json(folder / "result.json") or {}
    metric = result.get("metric")
    score = f"{metric} {result['metrics'][metric]:.4f}, " if metric in result.get("metrics", {}) else ""
    told = f"{score}{state.seconds or 0.0:.0f} s" if state.state == "done" else state.reason
    return f"{state.state}: {name}{f' ({told})' if told else ''}"


def watch_hint(sweep: Sweep) -> str:
    """The command that shows what becomes of a sweep's runs."""
    return f"python -m experiments.status{_where(sweep)} --watch"


def outlive_terminal() -> None:
    """Go on without a terminal when it is closed."""

    def detach(number: int, frame: FrameType | None) -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            with suppress(OSError):
                os.dup2(nowhere, descriptor)

    with suppress(ValueError):  # signals are the main thread's
        signal.signal(signal.SIGHUP, detach)


def _where(sweep: Sweep) -> str:
    return "" if sweep.results_dir == "results" else f" results_dir={sweep.results_dir}"
