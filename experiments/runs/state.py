"""What became of a run, from what is on disk: its own status first, then how its job ended. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.runs.folder import read_json
from experiments.runs.locks import is_locked

#: In the order in which they are told.
STATES = ("done", "running", "queued", "died", "failed", "missing")


@dataclass
class RunState:
    """A run's state, one line of why, and what is known of its time and progress."""

    state: str
    reason: str = ""
    started: float | None = None
    updated: float | None = None
    progress: tuple[int, int] | None = None

    @property
    def seconds(self) -> float | None:
        """How long it has run, or ran."""
        if self.started is None:
            return None
        end = time.time() if self.state == "running" else self.updated
        return max((end or self.started) - self.started, 0.0)


def run_state(folder: Path, outcome: dict[str, Any] | None = None, job: str | None = None) -> RunState:
    """The state of a run's folder.

    Args:
        folder: the run's.
        outcome: of its job, if that ended; tells why a process that couldn't say so itself is gone.
        job: what Slurm calls the job's state, if it knows the job.
    """
    status = read_json(folder / "status.json")
    waits = job in ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "RESV_DEL_HOLD")
    why = (outcome or {}).get("error") or (f"Slurm: {job}" if job and job not in ("RUNNING", "COMPLETED") else "")
    if status is None:
        if waits or job in ("RUNNING", "COMPLETING"):
            return RunState("queued", "starting" if job == "RUNNING" else "")
        if outcome is not None and outcome.get("code"):
            return RunState("failed", why)
        return RunState("missing", why)
    told, error = str(status.get("state")), str(status.get("error") or "")
    counts = status.get("progress") or {}
    progress = (int(counts["done"]), int(counts["total"])) if {"done", "total"} <= counts.keys() else None
    times: dict[str, Any] = {"started": status.get("started"), "updated": status.get("updated"), "progress": progress}
    if told == "done":
        return RunState("done" if (folder / "result.json").exists() else "missing", **times)
    if is_locked(folder) is not None:
        return RunState("running", **times)
    if told == "running":
        return (
            RunState("queued", "goes on", **times) if waits else RunState("died", why or "its process is gone", **times)
        )
    if waits:
        return RunState("queued", f"again after: {error}" if error else "again", **times)
    if outcome is not None and outcome.get("error") and float(status.get("updated") or 0) < outcome.get("started", 0):
        return RunState("failed", why, **times)  # the status is of an earlier attempt, the last one didn't get that far
    return RunState(told if told in STATES else "failed", error or why, **times)
