"""``hydra/launcher=local``: several jobs at once in processes of this machine; one that is killed stops no other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

from experiments.config.validate import to_dataclass
from experiments.sweeps.job import THREAD_VARIABLES, record_death, start_job
from experiments.sweeps.monitor import detach_on_hangup, monitor_runs
from experiments.sweeps.plan import PlannedJob
from experiments.sweeps.record import Sweep
from experiments.system.console import log_info

#: Seconds that interrupted jobs get to save their work before they are killed.
GRACE_S = 60.0


@dataclass
class Settings:
    """``hydra.launcher.*``."""

    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs is {self.jobs}; valid: 1 or more")


@dataclass
class Machine:
    """Machine divided among ``slots`` jobs that run at once.

    Attributes:
        slots: number of jobs.
        threads: of each job.
        gpus: of each job, as CUDA_VISIBLE_DEVICES names them; empty if all jobs see all GPUs.
    """

    slots: int
    threads: int
    gpus: list[list[str]]

    @classmethod
    def divide(cls, jobs: int | None, gpus: list[str], gpus_per_job: int) -> Machine:
        """Divide cores and GPUs among jobs; by default one job per set of GPUs, or per four cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        slots = jobs or (max(len(gpus) // gpus_per_job, 1) if gpus else max(cores // 4, 1))
        sets = [gpus[slot * gpus_per_job : (slot + 1) * gpus_per_job] for slot in range(slots)]
        enough = len(gpus) >= slots * max(gpus_per_job, 1)
        return cls(slots, max(cores // slots, 1), sets if enough else [])


def visible_gpus() -> list[str]:
    """Return the GPUs that jobs may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


@dataclass
class JobProcess:
    """A job's process and its start, seconds since 1970."""

    index: int
    process: subprocess.Popen[bytes]
    started: float


class LocalLauncher:
    """Run jobs in a few slots, each with its share of the cores and GPUs.

    Raises:
        ConfigError: unknown or invalid setting.
    """

    needs_snapshot = True

    def __init__(self, planned: list[PlannedJob]) -> None:
        settings = to_dataclass(Settings, planned[0].settings, "hydra.launcher")
        gpus_per_job = max(0 if one.config.device == "cpu" else one.config.model.resources.gpus for one in planned)
        self.machine = Machine.divide(settings.jobs, visible_gpus() if gpus_per_job else [], gpus_per_job)
        self.running: dict[int, JobProcess] = {}  # by slot

    def run(self, sweep: Sweep, todo: list[int]) -> int:
        """Run the jobs; return 0 if all their runs are done, else 1."""
        if not todo:
            return 0
        slots = min(self.machine.slots, len(todo))
        log_info(f"{slots} at once, {self.machine.threads} threads each; logs: {sweep.path / 'jobs'}")
        detach_on_hangup()
        waiting = list(todo)
        try:
            return monitor_runs(sweep, todo, lambda: self._update(sweep, waiting))
        finally:
            self._stop(sweep)

    def _update(self, sweep: Sweep, waiting: list[int]) -> dict[int, str]:
        """Record the jobs that have ended, fill free slots; return the states of the other jobs."""
        for slot, job in list(self.running.items()):
            if (code := job.process.poll()) is not None:
                record_death(sweep, job.index, code, job.started)
                del self.running[slot]
        for slot in range(self.machine.slots):
            if slot not in self.running and waiting:
                self.running[slot] = self._start(sweep, slot, waiting.pop(0))
        return {**dict.fromkeys(waiting, "PENDING"), **{job.index: "RUNNING" for job in self.running.values()}}

    def _start(self, sweep: Sweep, slot: int, index: int) -> JobProcess:
        """Start a job in a session of its own, out of reach of the terminal's hang-up and ctrl-c."""
        environment = {name: os.environ.get(name, str(self.machine.threads)) for name in THREAD_VARIABLES}
        if self.machine.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.machine.gpus[slot])
        sweep.log_path(index).parent.mkdir(exist_ok=True)
        with open(sweep.log_path(index), "ab") as log:
            started = time.time()
            process = start_job(
                sweep, index, environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return JobProcess(index, process, started)

    def _stop(self, sweep: Sweep) -> None:
        """Let running jobs save their work and end; kill those that take too long."""
        for job in self.running.values():
            job.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        for job in self.running.values():
            try:
                job.process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            record_death(sweep, job.index, job.process.returncode, job.started)
        self.running.clear()
