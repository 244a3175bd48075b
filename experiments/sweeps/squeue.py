"""What Slurm says of jobs. Only ``squeue`` is asked: it needs no accounting database and knows of an end at once."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable

#: States of jobs that have yet to end; all others are ends.
ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
    "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip


def job_states(ids: Iterable[str], timeout_s: float = 30.0) -> dict[str, str] | None:
    """Slurm's state of each job that it still knows, which are those that ended within the last minutes too.

    Returns:
        ``{"13_0": "RUNNING"}``; ``None`` where Slurm isn't there or doesn't answer.
    """
    wanted = set(ids)
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        return None
    bases = ",".join(sorted({one.partition("_")[0] for one in wanted}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={bases}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if len(line.split(maxsplit=1)) == 2)
    return {one: found[one] for one in wanted if one in found}
