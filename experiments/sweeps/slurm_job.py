"""Body of a Slurm job: a parent that runs the job's process and requeues the job when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from experiments.sweeps.job import THREAD_VARIABLES, record_death, start_job
from experiments.sweeps.record import read_sweep
from experiments.sweeps.squeue import job_states

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


class QueuedJob:
    """One job of a sweep, as submitit calls it.

    A child does the work, and saves and ends when it is signalled. This parent outlives it, so that even a killed
    child leaves a reason, and so that submitit can requeue the same job, which then resumes.
    """

    def __init__(self, sweep: str, index: int, grace_s: float) -> None:
        self.sweep, self.index, self.grace_s = sweep, index, grace_s
        self.process: subprocess.Popen[bytes] | None = None
        self.terminated = False

    def __call__(self) -> None:
        """Run the job; raise a RuntimeError, which makes it a failed job for Slurm, if it fails."""
        sweep = read_sweep(Path(self.sweep))
        if sweep is None:
            raise RuntimeError(f"no record of a sweep in {self.sweep}")
        signal.signal(signal.SIGTERM, self._terminate)
        threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        started = time.time()
        self.process = start_job(sweep, self.index, {name: os.environ.get(name, threads) for name in THREAD_VARIABLES})
        while (code := self.process.poll()) is None:  # a blocking wait would delay the signals' handlers
            time.sleep(0.1)
        record_death(sweep, self.index, code, started)
        # Terminated, but neither cancelled nor over its limit: preempted.
        if code and self.terminated:
            job_id = current_job_id()
            if (job_states([job_id], timeout_s=60.0) or {}).get(job_id) == "RUNNING":
                subprocess.run(["scontrol", "requeue", job_id], check=True, timeout=60)
        if code:
            raise RuntimeError(
                f"job {self.index} of {self.sweep} ended with exit code {code}; see the status of its runs"
            )

    def checkpoint(self) -> DelayedSubmission:
        """Return the same job for requeueing, once the child has saved its work; called by submitit at the signal."""
        from submitit.helpers import DelayedSubmission

        # Slurm may have signalled the child too; kill it if it takes too long.
        for number, seconds in ((signal.SIGUSR2, self.grace_s), (signal.SIGKILL, 5.0)):
            end = time.monotonic() + seconds
            self._signal(number)
            while self._is_running() and time.monotonic() < end:
                time.sleep(0.1)
        return DelayedSubmission(QueuedJob(self.sweep, self.index, self.grace_s))

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """Forward the signal of a preempted or cancelled job, so that the child saves its work."""
        self.terminated = True
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self._is_running():
            os.kill(self.process.pid, number)

    def _is_running(self) -> bool:
        """Return whether there is a child that has not ended, without consuming its exit code."""
        try:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return self.process is not None and os.waitid(os.P_PID, self.process.pid, flags) is None
        except ChildProcessError:
            return False


def current_job_id() -> str:
    """Return the id of this process's own job, as Slurm's commands take it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
