"""``hydra/launcher=local``: several jobs at once in processes of this machine; one that is killed stops no other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

from experiments.config.schema import to_dataclass
from experiments.sweeps.follow import follow, outlive_terminal
from experiments.sweeps.job import note_death, start
from experiments.sweeps.record import Planned, Sweep
from experiments.system.console import say

#: Time to save what was begun, from the request to stop until the process is killed.
GRACE_S = 60.0


@dataclass
class Settings:
    """``hydra.launcher.*``."""

    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs is {self.jobs}; valid: 1 or more")


def prepare(planned: list[Planned]) -> Local:
    """The launcher as its settings say.

    Raises:
        ConfigError: an unknown or wrong setting.
    """
    settings = to_dataclass(Settings, planned[0].settings, "hydra.launcher")
    needed = max(0 if one.config.device == "cpu" else one.config.model.resources.gpus for one in planned)
    return Local(settings.jobs, gpus_here() if needed else [], needed)


def gpus_here() -> list[str]:
    """The GPUs that jobs may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


class Local:
    """A few slots, each with its share of the cores and, where a job needs some, of the GPUs."""

    def __init__(self, jobs: int | None, gpus: list[str], gpus_each: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.slots = jobs or (max(len(gpus) // gpus_each, 1) if gpus else max(cores // 4, 1))
        self.threads = max(cores // self.slots, 1)
        shared = len(gpus) < self.slots * max(gpus_each, 1)
        self.gpus = [] if shared else [gpus[slot * gpus_each : (slot + 1) * gpus_each] for slot in range(self.slots)]
        self.running: dict[int, tuple[int, subprocess.Popen[bytes], float]] = {}  # slot -> job, process, start

    def __call__(self, sweep: Sweep, todo: list[int]) -> int:
        """Run the jobs; returns 0 if all their runs are done, else 1."""
        if not todo:
            return 0
        slots = min(self.slots, len(todo))
        say(f"{slots} at once, {self.threads} threads each; logs: {sweep.path / 'jobs'}")
        outlive_terminal()
        waiting = list(todo)
        try:
            return follow(sweep, todo, lambda: self.turn(sweep, waiting))
        finally:
            self.stop(sweep)

    def turn(self, sweep: Sweep, waiting: list[int]) -> dict[int, str]:
        """Note what ended, fill free slots; returns the jobs that haven't ended."""
        for slot, (index, process, began) in list(self.running.items()):
            if (code := process.poll()) is not None:
                note_death(sweep, index, code, began)
                del self.running[slot]
        for slot in range(self.slots):
            if slot not in self.running and waiting:
                self.running[slot] = self.begin(sweep, slot, waiting.pop(0))
        running = {index: "RUNNING" for index, _, _ in self.running.values()}
        return {**dict.fromkeys(waiting, "PENDING"), **running}

    def begin(self, sweep: Sweep, slot: int, index: int) -> tuple[int, subprocess.Popen[bytes], float]:
        """Start a job in a session of its own: neither the terminal's end nor its Ctrl-C reaches it."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = {name: os.environ.get(name, str(self.threads)) for name in names}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[slot])
        sweep.log_path(index).parent.mkdir(exist_ok=True)
        with open(sweep.log_path(index), "ab") as log:
            began = time.time()
            process = start(
                sweep, index, environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return index, process, began

    def stop(self, sweep: Sweep) -> None:
        """Ask what still runs to save and end, and wait for it."""
        for _, process, _ in self.running.values():
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        for index, process, began in self.running.values():
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            note_death(sweep, index, process.returncode, began)
        self.running.clear()
