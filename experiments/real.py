"""``python -m experiments.real`` (``make real``): methods on a real model and on real texts that every machine has.

A head profile of SmolLM2-135M is made first. It gives ``chai``, ``chai_static`` and ``random`` the same number of
clusters in each layer. Then every method is measured on each corpus, and on the paper's tasks if ``--data`` is given.
Complete runs are not repeated. ``real.json`` in the results folder lists the runs, of which ``python -m analysis.tables
real`` makes a table.

Exit codes: 0 done, 1 a run failed, 2 invalid command line; else as ``run.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from experiments.config.aliases import replace_aliases
from experiments.config.compose import compose_config, data_path
from experiments.config.schema import ConfigError
from experiments.config.validate import check_overrides
from experiments.execute import run_config
from experiments.runs.files import read_json, write_json
from experiments.runs.folder import RunFolder
from experiments.runs.resolve import run_folders
from experiments.system.console import console, log_error, log_info
from experiments.system.interrupts import exit_when_interrupted

RECORD = "real.json"
MODEL = ("model=smollm2_135m", "model.dtype=float32")  # many CPUs have no instructions for bfloat16
#: Few and short texts, which neither corpus contains; the elbow of the clustering error, as in the paper (Section 3.2).
PROFILE = (
    "experiment=profile", "corpus=python_packages", "profile.samples=32", "profile.tokens=128",
    "profile.history_samples=8", "profile.rule=plateau", "profile.tolerance=0.05",
)  # fmt: skip
PERPLEXITY = ("experiment=perplexity", "experiment.tokens=4096", "experiment.document_tokens=256", "batch_size=8")
CORPORA = ("python_docs", "python_code")
BASE = "mha"  # without clusters, hence without a profile
METHODS = (BASE, "chai", "chai_static", "random")
TASKS = ("piqa", "hellaswag", "arc_challenge", "arc_easy", "boolq")
HUB = "hub"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser("python -m experiments.real", description="Methods on a real model.")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of every run, such as results_dir=DIR")
    parser.add_argument("--data", metavar="DIR", help=f"score tasks as well, from this folder or from the {HUB}")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="items of each task (100)")
    options = parser.parse_args(arguments)
    try:
        with exit_when_interrupted():
            return run_all(options.settings, options.data or None, options.limit)
    except ConfigError as error:
        log_error(str(error))
        return 2


def run_all(settings: Sequence[str], data: str | None, limit: int) -> int:
    """Make the profile and all runs; return the worst exit code."""
    evaluations = [*perplexity_runs(), *(task_runs(data, limit) if data else ())]
    total = 1 + len(evaluations)
    (profile,) = run_folders(config := configure([*MODEL, *PROFILE, *settings]))
    if code := do(config, profile, f"1/{total}"):
        return code
    folders, codes = [profile], [0]
    for number, overrides in enumerate(evaluations, 2):
        counts = [] if f"method={BASE}" in overrides else [f"method.profile='{profile.path}'"]
        (folder,) = run_folders(config := configure([*MODEL, *overrides, *counts, *settings]))
        codes.append(do(config, folder, f"{number}/{total}"))
        folders.append(folder)
    results_dir = Path(config.results_dir)
    if all(folder.is_done for folder in folders):
        write_json(results_dir / RECORD, {"runs": [os.path.relpath(folder.path, results_dir) for folder in folders]})
    return max(codes)


def perplexity_runs() -> Iterator[list[str]]:
    """Yield the overrides of each method on each corpus."""
    for corpus in CORPORA:
        for method in METHODS:
            yield [*PERPLEXITY, f"corpus={corpus}", f"method={method}"]


def task_runs(data: str, limit: int) -> Iterator[list[str]]:
    """Yield the overrides of each method on each task with data; a ConfigError if there is none."""
    source = [] if data == HUB else [f"task.data_dir='{data}'"]
    found = {}
    for task in TASKS:
        path = data_path(configure([f"task={task}", *source]).task)
        if path is None or path.is_file():
            found[task] = path
        else:
            log_info(f"left out: {task}, for there is no {path}")
    if not found:
        raise ConfigError(f"{data} has no data of a task; valid: a folder with piqa_validation.jsonl ..., or hub")
    for task in found:
        for method in METHODS:
            yield [f"task={task}", *source, f"method={method}", f"limit={limit}"]


def configure(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a run; a ConfigError for settings that it cannot have."""
    known = replace_aliases(list(overrides))
    check_overrides(known)
    return compose_config(known)


def do(config: DictConfig, folder: RunFolder, place: str) -> int:
    """Do one run, unless it is complete, with two lines of output instead of its table; return the exit code."""
    if folder.is_done and not config.force:
        return 0
    method, model, on = (folder.config[section].name for section in ("method", "model", "task"))
    log_info(f"[{place}] {f'head profile of {model}' if config.experiment.name == 'profile' else method} on {on}")
    console.quiet = True
    try:
        code = run_config(config)
    finally:
        console.quiet = False
    if code == 0 and not folder.is_done:
        log_error(f"another process is at work on {folder.path}")
        return 1
    result = read_json(folder.path / "result.json") or {}
    if code == 0 and "metric" in result:
        log_info(f"      {result['metric']} {result['metrics'][result['metric']]:.4g}, {result['seconds']:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
