"""``hydra/launcher=local``: several jobs at once in processes of this machine; one that is killed stops no other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from experiments.config.validate import to_dataclass
from experiments.sweeps.job import THREAD_VARIABLES, record_death, start_job
from experiments.sweeps.monitor import monitor_runs
from experiments.sweeps.plan import PlannedJob
from experiments.sweeps.record import Sweep
from experiments.system.console import log_info

GRACE_S = 60.0  # that interrupted jobs get to save their work before they are killed


@dataclass
class Settings:
    """``hydra.launcher.*``."""

    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs is {self.jobs}; valid: 1 or more")


def visible_gpus() -> list[str]:
    """Return the GPUs that jobs may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def divide_machine(jobs: int | None, gpus: list[str], gpus_per_job: int) -> list[dict[str, str]]:
    """Return the environment variables of each of the jobs that run at once: their shares of the cores and GPUs.

    ``jobs=None``: one per set of GPUs, or per four cores without GPUs. If there are too few GPUs, all jobs see all.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    jobs = jobs or (max(len(gpus) // gpus_per_job, 1) if gpus else max(cores // 4, 1))
    threads = {name: os.environ.get(name, str(max(cores // jobs, 1))) for name in THREAD_VARIABLES}
    if len(gpus) < jobs * max(gpus_per_job, 1):
        return [threads] * jobs
    sets = (gpus[job * gpus_per_job : (job + 1) * gpus_per_job] for job in range(jobs))
    return [{**threads, "CUDA_VISIBLE_DEVICES": ",".join(names)} for names in sets]


class LocalLauncher:
    """Run jobs in a few slots, each with its share of the cores and GPUs."""

    def __init__(self, planned: list[PlannedJob]) -> None:
        settings = to_dataclass(Settings, planned[0].settings, "hydra.launcher")
        gpus_per_job = max(0 if one.config.device == "cpu" else one.config.model.resources.gpus for one in planned)
        self.slots = divide_machine(settings.jobs, visible_gpus() if gpus_per_job else [], gpus_per_job)
        self.running: dict[int, tuple[int, subprocess.Popen[bytes], float]] = {}  # slot: job, process, start time

    def run(self, sweep: Sweep, todo: list[int]) -> int:
        """Run the jobs; return 0 if all their runs are done, else 1."""
        if not todo:
            return 0
        threads, slots = self.slots[0][THREAD_VARIABLES[0]], min(len(self.slots), len(todo))
        log_info(f"{slots} at once, {threads} threads each; logs: {sweep.path / 'jobs'}")
        with suppress(ValueError):  # only the main thread can set handlers
            signal.signal(signal.SIGHUP, _detach)
        waiting = list(todo)
        try:
            return monitor_runs(sweep, todo, lambda: self._update(sweep, waiting))
        except BaseException:
            for _, process, _ in self.running.values():
                process.send_signal(signal.SIGTERM)
            raise
        finally:
            self._wait(sweep)

    def _update(self, sweep: Sweep, waiting: list[int]) -> dict[int, str]:
        """Record the jobs that have ended, fill free slots; return the states of the other jobs."""
        for slot, (index, process, started) in list(self.running.items()):
            if (code := process.poll()) is not None:
                record_death(sweep, index, code, started)
                del self.running[slot]
        for slot, environment in enumerate(self.slots):
            if slot not in self.running and waiting:
                index, started = waiting.pop(0), time.time()
                path = sweep.outcome_path(index).with_suffix(".log")
                path.parent.mkdir(exist_ok=True)
                # The job gets a session of its own, out of reach of the terminal's hang-up and ctrl-c.
                with open(path, "ab") as log:
                    options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
                    self.running[slot] = (index, start_job(sweep, index, environment, **options), started)
        return dict.fromkeys(waiting, "PENDING") | {index: "RUNNING" for index, _, _ in self.running.values()}

    def _wait(self, sweep: Sweep) -> None:
        """Let jobs finish saving (or uploading, after the run is done); kill those that take too long."""
        end = time.monotonic() + GRACE_S
        for index, process, started in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))
            process.kill()  # no effect on a process that has ended
            process.wait()
            record_death(sweep, index, process.returncode, started)


def _detach(number: int, frame: FrameType | None) -> None:
    """Continue without the terminal that has been closed."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            os.dup2(null, descriptor)
