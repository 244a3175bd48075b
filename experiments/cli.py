"""The command line: help, early refusal of mistakes, then one run here, or a sweep where its launcher has it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig

from experiments.config.schema import CONF, ConfigError, check_overrides, choices, groups, register
from experiments.sweeps.expand import expand
from experiments.system.console import complain
from experiments.system.interrupts import Interrupted, interruptible, interruption
from experiments.system.processes import world_size

#: The module of each experiment.
EXPERIMENTS = {
    "accuracy": "evaluation.accuracy",
    "latency": "benchmarks.latency",
    "memory": "benchmarks.memory",
    "profile": "offline.profile_heads",
    "train_dejavu": "offline.train_dejavu",
    "pretrain_tiny": "offline.pretrain_tiny",
}

HELP = """\
CHAI-lab: clustered head attention, its competitors, and how they compare.

  python run.py                                       CHAI on the embedded model and its five tasks
  python run.py method=mha model=llama7b task=piqa    one method, one model, one task
  python run.py -m method=mha,chai task=piqa,boolq    a sweep: every combination
  python run.py -m paper=table2                       the runs of one of the paper's tables
  python run.py -m hydra/launcher=slurm paper=table2  the same as jobs of a Slurm cluster (docs/sweeps.md)
  python run.py experiment=profile model=tiny         how many clusters, which heads: the offline phase
  python run.py model.path=/data/my-llama task=paper task.data_dir=/data/tasks    local weights and data
  accelerate launch --num_processes 4 run.py model=llama7b task=paper    a GPU each (docs/several_gpus.md)
  python -m experiments.status                        what became of the sweeps

Choices
{choices}

Settings (key=value; `python run.py --cfg job` prints all of them, those of the chosen method included)
  limit=N         score only the first N items of each task
  batch_size=N    sequences in one forward pass (16)
  device=D        auto, cpu, cuda, cuda:1, mps
  seed=N          of everything random (0)
  force=true      do a run again although it is done
  results_dir=D   where runs keep their folders (results)
  method.K=V      a hyper-parameter, e.g. method.clusters=8 or method.clusters='[8,6,4,4]'
  model.K=V       path, hub_id, revision, dtype, device_map, random_init, architecture.num_hidden_layers ...
  task.K=V        data_dir, num_fewshot
  profile.K=V     of experiment=profile: samples, tokens, rule, tolerance, saving ... (docs/profile.md)
  logger.K=V      of logger=wandb: project, entity, group, mode, timeout (docs/tracking.md)
  corpus.K=V      of experiment=profile: path (.jsonl, or a text a line), hub_id, subset, split, column
  hydra.launcher.K=V    of slurm: timeout_min, gpus_per_node, mem_gb, partition, array_parallelism ...; of local: jobs

Exit codes: 0 done, 1 a run failed (its status.json says why), 2 a mistake in the command line, 130 interrupted
by ctrl-c, 143 by SIGTERM, 140 by SIGUSR2 (the same command goes on). A run that another process works on is left to it
and counts as no failure.
"""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    from hydra._internal.utils import get_args_parser

    args = get_args_parser().parse_args(arguments)
    if args.help:
        names = [*groups(), "hydra/launcher"]
        width = max(map(len, names))
        print(HELP.format(choices="\n".join(f"  {group:<{width}}  {', '.join(choices(group))}" for group in names)))
        return 0
    try:
        sweeps = expand(args.overrides, multirun=args.multirun)
        for overrides in sweeps:
            check_overrides(overrides, multirun=args.multirun)
        if args.multirun and (args.cfg or args.info):
            raise ConfigError("--cfg and --info show one run: leave -m and lists of values out")
        if args.multirun:
            from experiments.sweeps.launch import launch

            with interruptible(), stopping():
                return launch(sweeps)
    except ConfigError as error:
        return refuse(error)
    flags = [argument for argument in arguments if argument not in args.overrides]
    with interruptible(), stopping():
        return max(through_hydra([*flags, *overrides]) for overrides in sweeps)


@contextmanager
def stopping() -> Iterator[None]:
    """End the process in one line where ctrl-c or a signal asks for it; what else there is to run isn't started.

    Raises:
        SystemExit: with 130, or 128 and the signal's number.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        reason, code = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else (str(error), error.code)
        print(f"{reason}: the same command goes on from here", file=sys.stderr)
        raise SystemExit(code) from None


def refuse(error: ConfigError) -> int:
    """Print the one line that says what is valid."""
    complain(str(error))
    return 2


def through_hydra(arguments: list[str]) -> int:
    """One run under Hydra's own main, or what its flags show of the configuration; returns the exit code."""
    import hydra

    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> None:
        codes.append(run_experiment(config))

    register()
    sys.argv = ["run.py", *arguments]
    job()
    return max(codes, default=0)


def run_experiment(config: DictConfig) -> int:
    """Run one composed configuration; returns its exit code."""
    return attempt(config)[0]


def attempt(config: DictConfig) -> tuple[int, str | None]:
    """Run one composed configuration; returns its exit code, and in one line what no run's folder can tell."""
    import importlib

    from experiments.system.console import quiet_libraries

    quiet_libraries()
    with interruptible(), stopping():
        try:
            if world_size() > 1 and config.experiment.name != "accuracy":
                raise ConfigError(f"experiment={config.experiment.name} runs in one process, not in {world_size()}")
            return importlib.import_module(f"experiments.{EXPERIMENTS[config.experiment.name]}").run(config), None
        except ConfigError as error:
            return refuse(error), str(error)
        except Exception as error:  # not foreseen: its traceback is worth having, and a sweep goes on
            if interruption(error) is not None:
                raise
            traceback.print_exc()
            return 1, f"{type(error).__name__}: {error}".splitlines()[0]
