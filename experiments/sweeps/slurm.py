"""``hydra/launcher=slurm``: jobs of a Slurm cluster through submitit, an array for each model's settings.

The client only watches: it may be closed, and a job that is killed, cancelled or over its limit hides no other.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.config.schema import ConfigError, to_dataclass
from experiments.sweeps.follow import follow, watch_hint
from experiments.sweeps.record import Planned, Sweep, read_sweeps
from experiments.sweeps.squeue import ACTIVE, job_states
from experiments.system.console import complain, say


@dataclass
class Settings:
    """``hydra.launcher.*``; see ``conf/hydra/launcher/slurm.yaml``."""

    timeout_min: int
    gpus_per_node: int
    cpus_per_task: int
    mem_gb: float
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array_parallelism: int = 16
    signal_delay_s: int | None = None
    max_num_timeout: int = 20
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    setup: list[Any] = field(default_factory=list)
    poll_s: float = 10.0

    def __post_init__(self) -> None:
        for name, least in {
            "timeout_min": 1, "gpus_per_node": 0, "cpus_per_task": 1, "array_parallelism": 1, "max_num_timeout": 0,
        }.items():  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: {least} or more")
        for name in ("mem_gb", "poll_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: more than 0")
        if self.signal_delay_s is None:
            self.signal_delay_s = min(self.timeout_min * 60 // 4, 120)
        if not 0 < self.signal_delay_s < self.timeout_min * 60:
            raise ValueError(
                f"signal_delay_s is {self.signal_delay_s}; valid: between 0 and the limit, {self.timeout_min * 60} s"
            )

    def parameters(self, code: Path) -> dict[str, Any]:
        """What submitit's executor is told, for jobs that start in the folder with their code."""
        own = asdict(self)
        for name in ("max_num_timeout", "poll_s", "gpus_per_node", "timeout_min", "mem_gb"):
            own.pop(name)
        return {
            **{key: value for key, value in own.items() if value is not None and value != []},
            "time": self.timeout_min,
            "mem": f"{int(self.mem_gb * 1024)}M",
            **({"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}),
            "stderr_to_stdout": True,
            # Since Slurm 22.05 a step doesn't take this over from its job, and would get one core.
            "srun_args": [f"--cpus-per-task={self.cpus_per_task}"],
            "additional_parameters": {"chdir": str(code), "requeue": True, **self.additional_parameters},
        }


def prepare(planned: list[Planned]) -> Slurm:
    """The launcher as its settings say.

    Raises:
        ConfigError: an unknown or wrong setting, or no Slurm here.
    """
    settings = [to_dataclass(Settings, one.settings, "hydra.launcher") for one in planned]
    for command in ("sbatch", "srun", "squeue"):
        if shutil.which(command) is None:
            raise ConfigError(
                f"hydra/launcher=slurm needs Slurm's commands, and there is no {command} here: launch on a login node "
                "of the cluster, or use hydra/launcher=local"
            )
    return Slurm(settings, [str(one.config.model.name) for one in planned])


class Slurm:
    """Submits, then watches."""

    def __init__(self, settings: list[Settings], models: list[str]) -> None:
        self.settings, self.models = settings, models

    def __call__(self, sweep: Sweep, todo: list[int]) -> int:
        """Submit the jobs and tell how their runs end; returns 0 if all are done, else 1.

        Raises:
            ConfigError: Slurm refuses all of them.
        """
        refused = self.submit(sweep, todo)
        followed = [index for index in todo if sweep.jobs[index].slurm_id is not None]
        if refused and not followed:
            raise ConfigError(f"Slurm refuses the jobs: {refused[0]}")
        for reason in refused:
            complain(f"Slurm refuses some of the jobs: {reason}")
        if not followed:
            return 0
        say(f"watching; the jobs go on without this client: {watch_hint(sweep)}")
        try:
            code = follow(sweep, followed, self.activity(sweep, followed), pause_s=min(1.0, self.settings[0].poll_s))
        except KeyboardInterrupt:
            ids = sorted({str(sweep.jobs[index].slurm_id).partition("_")[0] for index in followed})
            print(
                f"not watching any more; the jobs go on: {watch_hint(sweep)}; scancel {' '.join(ids)} ends them",
                file=sys.stderr,
            )
            return 130
        return 1 if refused else code

    def submit(self, sweep: Sweep, todo: list[int]) -> list[str]:
        """Submit what isn't queued already, and record the ids; returns why Slurm refused some."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        from experiments.sweeps.slurm_job import QueuedJob

        queued = queued_already(sweep)
        groups: dict[tuple[str, str], list[int]] = {}
        for index in todo:
            job = sweep.jobs[index]
            if not job.force and (before := queued.get(tuple(job.runs))):
                job.slurm_id = before
                say(f"queued already, as job {before}: {' '.join(job.overrides)}")
            else:
                key = (self.models[index], json.dumps(asdict(self.settings[index]), sort_keys=True))
                groups.setdefault(key, []).append(index)
        refused = []
        for (model, _), indices in groups.items():
            settings = self.settings[indices[0]]
            executor = submitit.SlurmExecutor(sweep.path / "slurm", max_num_timeout=settings.max_num_timeout)
            grace_s = 0.8 * float(settings.signal_delay_s or 0)
            try:
                executor.update_parameters(**settings.parameters(sweep.path / "code"), job_name=f"chai-{model}")
                # submitit repeats there what sbatch says, which comes with the error as well
                with redirect_stderr(io.StringIO()), executor.batch():
                    jobs = [executor.submit(QueuedJob(str(sweep.path), index, grace_s)) for index in indices]
            except (FailedJobError, FailedSubmissionError, ValueError) as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                refused.append(next((line for line in lines if line.startswith("sbatch: error")), lines[-1]))
                continue
            for index, submitted in zip(indices, jobs, strict=True):
                sweep.jobs[index].slurm_id = submitted.job_id
            sweep.write()
            asked = f"{settings.gpus_per_node} GPUs, {settings.cpus_per_task} cores, {settings.mem_gb:g} GB"
            base = jobs[0].job_id.partition("_")[0]
            say(f"job {base}: {len(jobs)} of {model}, each {asked}, {settings.timeout_min} min")
        sweep.write()
        return refused

    def activity(self, sweep: Sweep, followed: list[int]) -> Callable[[], dict[int, str]]:
        """A function that says which jobs go on; it asks Slurm every so often, and again if Slurm doesn't answer."""
        ids = {index: str(sweep.jobs[index].slurm_id) for index in followed}
        known = dict.fromkeys(ids.values(), "PENDING")
        asked = 0.0

        def active() -> dict[int, str]:
            nonlocal known, asked
            if time.monotonic() - asked >= self.settings[0].poll_s or not asked:
                if (answer := job_states(ids.values())) is not None:
                    known = answer
                asked = time.monotonic()
            return {index: _simple(known.get(one)) for index, one in ids.items()}

        return active


def _simple(state: str | None) -> str:
    """``PENDING`` or ``RUNNING`` for what has yet to end, else Slurm's own word for the end."""
    if state in ("RUNNING", "COMPLETING"):
        return "RUNNING"
    return "PENDING" if state in ACTIVE else state or ""


def queued_already(sweep: Sweep) -> dict[tuple[str, ...], str]:
    """For the runs of each job of earlier sweeps that Slurm still has, its id."""
    ids = {tuple(job.runs): job.slurm_id for other in read_sweeps(sweep.results) for job in other.jobs if job.slurm_id}
    states = job_states(one for one in ids.values() if one) or {}
    return {runs: one for runs, one in ids.items() if one and states.get(one) in ACTIVE - {"COMPLETING"}}
