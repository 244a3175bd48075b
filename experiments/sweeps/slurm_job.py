"""What a Slurm job runs: a run's process under a parent that queues the job again when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType

from submitit.helpers import DelayedSubmission

from experiments.sweeps.job import note_death, start
from experiments.sweeps.record import read_sweep


class QueuedJob:
    """One job of a sweep, as submitit calls it.

    The work is done by a child, which saves and ends by itself when it is told to. This parent survives it, so that
    even a killed child leaves a reason, and so that submitit can queue the same job again: it then goes on.
    """

    def __init__(self, sweep: str, index: int, grace_s: float) -> None:
        self.sweep, self.index, self.grace_s = sweep, index, grace_s
        self.process: subprocess.Popen[bytes] | None = None
        self.told_to_end = False

    def __call__(self) -> None:
        """Do the job.

        Raises:
            RuntimeError: it failed, which is how Slurm comes to know.
        """
        sweep = read_sweep(Path(self.sweep))
        if sweep is None:
            raise RuntimeError(f"no record of a sweep in {self.sweep}")
        signal.signal(signal.SIGTERM, self._terminate)
        threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        began = time.time()
        self.process = start(sweep, self.index, {name: os.environ.get(name, threads) for name in names})
        while (code := self.process.poll()) is None:  # a blocking wait would keep the signals' handlers from waiting
            time.sleep(0.1)
        note_death(sweep, self.index, code, began)
        if code and self.told_to_end and slurm_state() == "RUNNING":  # neither cancelled nor over its limit: preempted
            subprocess.run(["scontrol", "requeue", own_id()], check=True, timeout=60)
        if code:
            raise RuntimeError(
                f"job {self.index} of {self.sweep} ended with exit code {code}; its runs' states tell why"
            )

    def checkpoint(self) -> DelayedSubmission:
        """The same job again, once the child has saved what it has; called by submitit at the signal."""
        if self.process is not None:
            self._end(self.process)
        return DelayedSubmission(QueuedJob(self.sweep, self.index, self.grace_s))

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Tell the child, which Slurm may have signalled too, wait for it, and insist if it takes too long."""
        for number, seconds in ((signal.SIGUSR2, self.grace_s), (signal.SIGKILL, 5.0)):
            if not _ended(process.pid):
                os.kill(process.pid, number)
            end = time.monotonic() + seconds
            while not _ended(process.pid) and time.monotonic() < end:
                time.sleep(0.1)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """Preempted, or cancelled: let the child save."""
        self.told_to_end = True
        if self.process is not None and not _ended(self.process.pid):
            os.kill(self.process.pid, signal.SIGTERM)


def own_id() -> str:
    """The id of the job that this process belongs to, as Slurm's commands take it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def slurm_state() -> str | None:
    """What Slurm calls the state of this process's own job; ``None`` if it doesn't answer."""
    command = ["squeue", "-h", "-o", "%T", "-j", own_id()]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _ended(pid: int) -> bool:
    """Whether a child has ended, without taking its exit code from whoever waits for it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
