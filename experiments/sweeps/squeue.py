"""States of Slurm jobs, from ``squeue`` alone: it needs no accounting database and reports an end at once."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable

#: States of jobs that have yet to end.
ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
    "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip


def job_states(ids: Iterable[str], timeout_s: float = 30.0) -> dict[str, str] | None:
    """Return ``{"13_0": "RUNNING"}``: jobs that Slurm still lists, including those that ended within the last minutes.

    ``None`` if Slurm is not installed or does not answer.
    """
    wanted = set(ids)
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        return None
    arrays = ",".join(sorted({job_id.partition("_")[0] for job_id in wanted}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={arrays}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    rows = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in wanted}
