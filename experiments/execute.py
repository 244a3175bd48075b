"""Execution of one composed configuration, and the mapping of its errors to exit codes."""

from __future__ import annotations

import importlib
import traceback

from omegaconf import DictConfig

from experiments.config.compose import expand_home
from experiments.config.schema import ConfigError
from experiments.system.console import log_error, logged_errors, quiet_libraries
from experiments.system.interrupts import exit_when_interrupted, interruption
from experiments.system.processes import world_size

#: The module of each experiment. Modules import torch, hence are imported only when they run.
EXPERIMENTS = {
    "accuracy": "evaluation.accuracy",
    "perplexity": "evaluation.perplexity",
    "latency": "benchmarks.latency",
    "memory": "benchmarks.memory",
    "profile": "offline.profile_heads",
    "ablations": "ablations.ablations",
    "train_dejavu": "offline.train_dejavu",
    "pretrain_tiny": "offline.pretrain_tiny",
}


def run_config(config: DictConfig) -> int:
    """Run one composed configuration; return 0 if done, 1 if it failed, 2 if it is invalid."""
    quiet_libraries()
    expand_home(config)  # Hydra's own main composes without it
    name = config.experiment.name
    with exit_when_interrupted():
        try:
            if world_size() > 1 and name != "accuracy":
                raise ConfigError(f"experiment={name} runs in one process, not in {world_size()}")
            return importlib.import_module(f"experiments.{EXPERIMENTS[name]}").run(config)
        except ConfigError as error:
            log_error(str(error))
            return 2
        except Exception as error:  # unexpected: print its traceback and let a sweep continue
            if interruption(error) is not None:
                raise
            traceback.print_exc()
            logged_errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
            return 1
