"""The command line: help, early refusal of mistakes, then Hydra's main with the experiment as its task."""

from __future__ import annotations

import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from experiments.config import CONF, ConfigError, check_overrides, choices, groups, register
from experiments.console import complain
from experiments.paper import expand
from experiments.processes import processes
from experiments.signals import Interrupted, interruptible, interruption

HELP = """\
CHAI-lab: clustered head attention, its competitors, and how they compare.

  python run.py                                       CHAI on the embedded model and its five tasks
  python run.py method=mha model=llama7b task=piqa    one method, one model, one task
  python run.py -m method=mha,chai task=piqa,boolq    a sweep: every combination
  python run.py -m paper=table2                       the runs of one of the paper's tables
  python run.py experiment=profile model=tiny         how many clusters, which heads: the offline phase
  python run.py model.path=/data/my-llama task=paper task.data_dir=/data/tasks    local weights and data
  accelerate launch --num_processes 4 run.py model=llama7b task=paper    a GPU each (docs/several_gpus.md)

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

Exit codes: 0 done, 1 a run failed (its status.json says why), 2 a mistake in the command line, 130 interrupted
by ctrl-c, 143 by SIGTERM, 140 by SIGUSR2 (the same command goes on). A run that another process works on is left to it
and counts as no failure.
"""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    from hydra._internal.utils import get_args_parser

    args = get_args_parser().parse_args(arguments)
    if args.help:
        width = max(map(len, groups()))
        print(HELP.format(choices="\n".join(f"  {group:<{width}}  {', '.join(choices(group))}" for group in groups())))
        return 0
    try:
        sweeps = expand(args.overrides, multirun=args.multirun)
        for overrides in sweeps:
            check_overrides(overrides, multirun=args.multirun)
    except ConfigError as error:
        return refuse(error)
    flags = [argument for argument in arguments if argument not in args.overrides]
    with interruptible(), stopping():
        return max(launch([*flags, *overrides]) for overrides in sweeps)


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


def launch(arguments: list[str]) -> int:
    """Hand over to Hydra. With a sweep, one failing run doesn't stop the others; the worst exit code is returned."""
    import hydra

    codes: list[int] = []
    sweeps: set[str] = set()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        if HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN:
            sweeps.add(HydraConfig.get().sweep.dir)
            config.logger.group = config.logger.group or Path(HydraConfig.get().sweep.dir).name
        codes.append(run_experiment(config))

    register()
    sys.argv = ["run.py", *arguments]
    job()
    if set(codes) == {2}:  # nothing was run, so nothing is to stay: not even Hydra's note of the sweep
        for folder in sweeps:
            shutil.rmtree(folder, ignore_errors=True)
    return max(codes, default=0)


def run_experiment(config: DictConfig) -> int:
    """Run one composed configuration; returns its exit code."""
    import importlib

    from experiments.console import quiet_libraries

    quiet_libraries()
    with interruptible(), stopping():
        try:
            if processes() > 1 and config.experiment.name != "accuracy":
                raise ConfigError(f"experiment={config.experiment.name} runs in one process, not in {processes()}")
            return importlib.import_module(f"experiments.{config.experiment.name}").run(config)
        except ConfigError as error:
            return refuse(error)
        except Exception as error:  # not foreseen: its traceback is worth having, and a sweep goes on
            if interruption(error) is not None:
                raise
            traceback.print_exc()
            return 1
