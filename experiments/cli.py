"""Command line: help, validation, then one run here or a sweep on its launcher."""

from __future__ import annotations

import argparse
import sys
import textwrap

import hydra
from omegaconf import DictConfig

from experiments.config.aliases import ALIASES
from experiments.config.compose import choices, compose_config, groups, mark_given
from experiments.config.schema import CONF, ConfigError, register
from experiments.config.validate import check_overrides
from experiments.execute import run_config
from experiments.sweeps.expand import expand
from experiments.sweeps.launch import launch
from experiments.system.console import log_error
from experiments.system.interrupts import exit_when_interrupted

HELP = """\
CHAI: clustered head attention, and the methods it is compared with.

  python run.py                                       CHAI on the embedded model and its five tasks
  python run.py method=mha model=llama7b task=piqa    one method, one model, one task
  python run.py -m method=mha,chai task=piqa,boolq    a sweep: every combination
  python run.py -m paper=table2                       the runs of one of the paper's tables
  python run.py -m hydra/launcher=slurm paper=table2  the same as jobs of a Slurm cluster (docs/sweeps.md)
  python run.py experiment=profile model=tiny         offline phase: cluster counts and static clusters
  python run.py model.path=/data/my-llama task=paper task.data_dir=/data/tasks    local weights and data
  accelerate launch --num_processes 4 run.py model=llama7b task=paper    one process per GPU (docs/several_gpus.md)
  python -m experiments.status                        state of all runs

Choices
{choices}

Settings (key=value; `python run.py --cfg job` prints all of them, those of the chosen method included)
  limit=N         score only the first N items of each task; below 1, that fraction of them
  batch_size=N    sequences in one forward pass (16); auto: by the memory of the device
  device=D        auto, cpu, cuda, cuda:1, mps
  seed=N          random seed (0)
  force=true      rerun even if the run is complete
  results_dir=D   folder of all run folders (results)
  method.K=V      a hyper-parameter, e.g. method.clusters=8 or method.clusters='[8,6,4,4]'
  model.K=V       path, gguf, hub_id, revision, dtype, device_map, random_init, architecture.num_hidden_layers ...
  task.K=V        data_dir, num_fewshot, apply_chat_template; of task=lm_eval: name, metric, include_path, overrides
  profile.K=V     of experiment=profile: samples, tokens, rule, tolerance, saving ... (docs/profile.md)
  logger.K=V      of logger=wandb: project, entity, group, mode, timeout (docs/tracking.md)
  corpus.K=V      of experiment=profile, perplexity, ablations: path (.jsonl, or one text per line), hub_id, subset,
                  split, column, python (docs or code); not of profile: joined
  hydra.launcher.K=V    of slurm: timeout_min, gpus_per_node, mem_gb, partition, array_parallelism ...; of local: jobs
  Aliases: {aliases}

Exit codes: 0 done, 1 a run failed (see its status.json), 2 invalid command line, 130 interrupted by ctrl-c,
143 by SIGTERM, 140 by SIGUSR2 (rerun the same command to resume). A run that is locked by another process is skipped
and does not count as a failure.
"""


#: Flags of Hydra's own command line, which show something or change what is composed.
HYDRA_SWITCHES = (("--resolve",), ("--run", "-r"), ("--hydra-help",), ("--version",), ("--shell-completion", "-sc"))
HYDRA_OPTIONS = (
    ("--package", "-p"), ("--config-path", "-cp"), ("--config-name", "-cn"), ("--config-dir", "-cd"),
    ("--experimental-rerun",),
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser("run.py", add_help=False)
    parser.add_argument("overrides", nargs="*")
    for names in (("--help", "-h"), ("--multirun", "-m"), *HYDRA_SWITCHES):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for names in HYDRA_OPTIONS:
        parser.add_argument(*names)
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        print(help_text())
        return 0
    try:
        sweeps = expand(options.overrides, multirun=options.multirun)
        for overrides in sweeps:
            check_overrides(overrides, multirun=options.multirun)
        if options.multirun and (options.cfg or options.info):
            raise ConfigError("--cfg and --info show one run: remove -m and lists of values")
        with exit_when_interrupted():
            if options.multirun:
                return launch(sweeps)
            (overrides,) = sweeps
            flags = [argument for argument in arguments if argument not in options.overrides]
            if flags or any(override.lstrip("+~").startswith("hydra") for override in overrides):
                return run_in_hydra([*overrides, *flags])
            return run_config(compose_config(overrides))
    except ConfigError as error:
        log_error(str(error))
        return 2


def help_text() -> str:
    """Return the text of ``--help``, with all choices and aliases."""
    names = [*groups(), "hydra/launcher"]
    width = max(map(len, names))
    aliases = ", ".join(f"{alias} ({key.rpartition('.')[2]})" for alias, (key, *_) in ALIASES.items())
    return HELP.format(
        choices="\n".join(f"  {group:<{width}}  {', '.join(choices(group))}" for group in names),
        aliases=textwrap.fill(aliases, 112, subsequent_indent=" " * 11, break_on_hyphens=False),
    )


def run_in_hydra(arguments: list[str]) -> int:
    """Run under Hydra's own main, for its flags and for settings that only it applies; return the exit code."""
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> None:
        mark_given(config, arguments)
        codes.append(run_config(config))

    register()
    sys.argv[1:] = arguments  # the only input of hydra.main; unlike the command line, without aliases
    job()
    return max(codes, default=0)
