"""``hydra/launcher=slurm``: jobs of a Slurm cluster through submitit, one array for each model's settings.

The client only watches: it may be closed, and a job that is killed, cancelled or over its limit hides no other.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.config.schema import ConfigError
from experiments.config.validate import to_dataclass
from experiments.sweeps.monitor import monitor_runs
from experiments.sweeps.plan import PlannedJob
from experiments.sweeps.record import Sweep, read_sweeps
from experiments.sweeps.slurm_job import QueuedJob
from experiments.sweeps.squeue import ACTIVE, job_states
from experiments.system.console import log_error, log_info

MINIMUM = {"timeout_min": 1, "gpus_per_node": 0, "cpus_per_task": 1, "array_parallelism": 1, "max_num_timeout": 0}


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
        for name, least in MINIMUM.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: {least} or more")
        for name in ("mem_gb", "poll_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: more than 0")
        limit_s = self.timeout_min * 60
        if self.signal_delay_s is None:
            self.signal_delay_s = min(limit_s // 4, 120)
        if not 0 < self.signal_delay_s < limit_s:
            raise ValueError(f"signal_delay_s is {self.signal_delay_s}; valid: between 0 and the limit, {limit_s} s")

    def submitit_parameters(self, code: Path) -> dict[str, Any]:
        """Return the parameters of submitit's executor, for jobs that start in the folder ``code``."""
        same = ("cpus_per_task", "partition", "account", "qos", "array_parallelism", "signal_delay_s", "setup")
        parameters = {
            **{name: getattr(self, name) for name in same},
            "gpus_per_node": self.gpus_per_node or None,
            "time": self.timeout_min,
            "mem": f"{int(self.mem_gb * 1024)}M",
            "stderr_to_stdout": True,
            # Since Slurm 22.05 a step does not inherit this from its job, and would get one core.
            "srun_args": [f"--cpus-per-task={self.cpus_per_task}"],
            "additional_parameters": {"chdir": str(code), "requeue": True, **self.additional_parameters},
        }
        return {name: value for name, value in parameters.items() if value not in (None, [])}


class SlurmLauncher:
    """Submit jobs, then watch them."""

    def __init__(self, planned: list[PlannedJob]) -> None:
        self.settings = [to_dataclass(Settings, one.settings, "hydra.launcher") for one in planned]
        self.models = [str(one.config.model.name) for one in planned]
        for command in ("sbatch", "srun", "squeue"):
            if shutil.which(command) is None:
                raise ConfigError(
                    f"hydra/launcher=slurm needs Slurm's commands, but {command} is not available: launch on a login "
                    "node of the cluster, or use hydra/launcher=local"
                )

    def run(self, sweep: Sweep, todo: list[int]) -> int:
        """Submit the jobs and log how their runs end; return 0 if all are done, else 1."""
        refusals = self._submit_all(sweep, todo)
        ids = {index: job_id for index in todo if (job_id := sweep.jobs[index].slurm_id) is not None}
        if refusals and not ids:
            raise ConfigError(f"Slurm refuses the jobs: {refusals[0]}")
        for reason in refusals:
            log_error(f"Slurm refuses some of the jobs: {reason}")
        if not ids:
            return 0

        def poll() -> dict[int, str] | None:
            states = job_states(ids.values())
            return None if states is None else {index: states.get(job_id, "") for index, job_id in ids.items()}

        log_info(f"watching; the jobs continue without this client: {sweep.status_command} --watch")
        try:
            code = monitor_runs(sweep, list(ids), poll, self.settings[0].poll_s)
        except KeyboardInterrupt:
            arrays = sorted({job_id.partition("_")[0] for job_id in ids.values()})
            hint = f"to watch: {sweep.status_command} --watch; to cancel: scancel {' '.join(arrays)}"
            print(f"stopped watching, the jobs continue; {hint}", file=sys.stderr)
            return 130
        return 1 if refusals else code

    def _submit_all(self, sweep: Sweep, todo: list[int]) -> list[str]:
        """Submit the jobs that are not queued already, and record their ids; return Slurm's reasons for refusals."""
        queued = _queued_jobs(sweep.results)
        arrays: dict[tuple[str, str], list[int]] = {}
        for index in todo:
            job = sweep.jobs[index]
            if not job.force and (slurm_id := queued.get(tuple(job.runs))):
                job.slurm_id = slurm_id
                log_info(f"already queued, as job {slurm_id}: {' '.join(job.overrides)}")
            else:
                key = (self.models[index], json.dumps(asdict(self.settings[index]), sort_keys=True))
                arrays.setdefault(key, []).append(index)
        refusals = [self._submit_array(sweep, indices) for indices in arrays.values()]
        sweep.write()
        return [reason for reason in refusals if reason is not None]

    def _submit_array(self, sweep: Sweep, indices: list[int]) -> str | None:
        """Submit jobs with equal settings as one array; return Slurm's reason if it refuses them."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        settings, model = self.settings[indices[0]], self.models[indices[0]]
        executor = submitit.SlurmExecutor(sweep.path / "slurm", max_num_timeout=settings.max_num_timeout)
        grace_s = 0.8 * float(settings.signal_delay_s or 0)
        try:
            executor.update_parameters(**settings.submitit_parameters(sweep.path / "code"), job_name=f"chai-{model}")
            # submitit prints sbatch's error, which is part of its exception as well.
            with redirect_stderr(io.StringIO()), executor.batch():
                jobs = [executor.submit(QueuedJob(str(sweep.path), index, grace_s)) for index in indices]
        except (FailedJobError, FailedSubmissionError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return next((line for line in lines if line.startswith("sbatch: error")), lines[-1])
        for index, job in zip(indices, jobs, strict=True):
            sweep.jobs[index].slurm_id = job.job_id
        sweep.write()
        resources = f"{settings.gpus_per_node} GPUs, {settings.cpus_per_task} cores, {settings.mem_gb:g} GB"
        array = jobs[0].job_id.partition("_")[0]
        log_info(f"job {array}: {len(jobs)} of {model}, each {resources}, {settings.timeout_min} min")
        return None


def _queued_jobs(results: Path) -> dict[tuple[str, ...], str]:
    """Return the ids of earlier sweeps' jobs that Slurm still has, by the runs of each."""
    ids = {tuple(job.runs): job.slurm_id for sweep in read_sweeps(results) for job in sweep.jobs if job.slurm_id}
    states = job_states(ids.values()) or {}
    return {runs: job_id for runs, job_id in ids.items() if states.get(job_id) in ACTIVE - {"COMPLETING"}}
