"""The launching client while jobs run elsewhere: one line per run as it ends, judged by the run's own status."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from experiments.runs.files import read_json
from experiments.runs.state import RunState, run_state
from experiments.sweeps.record import Sweep
from experiments.sweeps.squeue import ACTIVE
from experiments.system.console import log_info


def monitor_runs(
    sweep: Sweep, todo: list[int], job_states: Callable[[], dict[int, str] | None], poll_s: float = 0.5
) -> int:
    """Log how runs end until all have ended; return 0 if all are done, else 1.

    ``job_states`` returns Slurm's name for the state of each job in ``todo``, or ``None`` while Slurm does not answer;
    it is called every ``poll_s`` seconds.
    """
    left = {(index, name) for index in todo for name in sweep.jobs[index].runs}
    total, failed = len(left), 0
    states, polled = dict.fromkeys(todo, "PENDING"), -math.inf
    while left:
        if time.monotonic() - polled >= poll_s:
            states = states if (polled_states := job_states()) is None else polled_states
            polled = time.monotonic()
        for index, name in sorted(left):
            folder, job = sweep.results / name, sweep.jobs[index]
            active = states.get(index) in ACTIVE
            state = run_state(folder, read_json(sweep.outcome_path(index)), None if active else states.get(index))
            # A forced run may still have the result of an earlier sweep, which does not count.
            if job.force and state.state == "done" and (state.started or 0.0) < sweep.created:
                state = RunState("missing", "not run again; the result is of an earlier sweep")
            if active and state.state != "done":
                continue
            left.discard((index, name))
            failed += state.state != "done"
            log_info(f"[{total - len(left)}/{total}] {_describe(name, folder, state)}")
        if left:
            time.sleep(min(1.0, poll_s))
    if failed:
        log_info(f"{failed} of {total} runs are not done; for the reasons: {sweep.status_command} --failed")
    return 1 if failed else 0


def _describe(name: str, folder: Path, state: RunState) -> str:
    """Return a run's state with its score and time, or with the reason."""
    result = read_json(folder / "result.json") or {}
    metric = result.get("metric")
    score = f"{metric} {result['metrics'][metric]:.4f}, " if metric in result.get("metrics", {}) else ""
    note = f"{score}{state.seconds or 0.0:.0f} s" if state.state == "done" else state.reason
    return f"{state.state}: {name}{f' ({note})' if note else ''}"
