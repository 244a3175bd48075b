"""State of a run, from what is on disk: its own status first, then how its job ended. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.runs.files import read_json
from experiments.runs.locks import lock_owner

#: In the order in which they are listed.
STATES = ("done", "running", "queued", "died", "failed", "missing")
#: Slurm's states of jobs that wait.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "RESV_DEL_HOLD")


@dataclass
class RunState:
    """A run's state with its reason, times (seconds since 1970) and progress (done, total)."""

    state: str
    reason: str = ""
    started: float | None = None
    updated: float | None = None
    progress: tuple[int, int] | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds that the run has taken so far, or took."""
        if self.started is None:
            return None
        end = time.time() if self.state == "running" else self.updated
        return max((end or self.started) - self.started, 0.0)


def is_done(folder: Path) -> bool:
    """Return whether a run's status says done and its result exists."""
    status = read_json(folder / "status.json") or {}
    return status.get("state") == "done" and (folder / "result.json").exists()


def run_state(folder: Path, outcome: dict[str, Any] | None = None, job: str | None = None) -> RunState:
    """Return the state of a run's folder.

    ``outcome`` is of its job, if that ended, and has the reason for a process that died without recording one; ``job``
    is Slurm's state of the job, if Slurm lists it.
    """
    status = read_json(folder / "status.json")
    outcome = outcome or {}
    job_reason = outcome.get("error") or (f"Slurm: {job}" if job and job not in ("RUNNING", "COMPLETED") else "")
    if status is None:
        if job in (*WAITING, "RUNNING", "COMPLETING"):
            return RunState("queued", "starting" if job == "RUNNING" else "")
        return RunState("failed" if outcome.get("code") else "missing", job_reason)
    state, error = str(status.get("state")), str(status.get("error") or "")
    counts = status.get("progress") or {}
    progress = (int(counts["done"]), int(counts["total"])) if {"done", "total"} <= counts.keys() else None
    known: dict[str, Any] = {"started": status.get("started"), "updated": status.get("updated"), "progress": progress}
    if state == "done":
        return RunState("done" if (folder / "result.json").exists() else "missing", **known)
    if lock_owner(folder) is not None:
        return RunState("running", **known)
    if job in WAITING:
        retry = f"retry after: {error}" if error else "retry"
        return RunState("queued", "will resume" if state == "running" else retry, **known)
    if state == "running":
        return RunState("died", job_reason or "its process is gone", **known)
    if outcome.get("error") and float(status.get("updated") or 0) < float(outcome.get("started") or 0):
        return RunState("failed", job_reason, **known)  # the last attempt ended before it could write a status
    return RunState(state if state in STATES else "failed", error or job_reason, **known)
