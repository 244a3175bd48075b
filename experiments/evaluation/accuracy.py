"""``experiment=accuracy``: score tasks under a method; one run folder for each task (paper, section 4.2)."""

from __future__ import annotations

import functools
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from chai.devices import describe_devices, input_device
from chai.flops import method_flops
from chai.methods import Mha, load_method
from chai.methods.base import Method
from chai.models import ModelError, ModelSource, load_config, load_model, load_tokenizer
from experiments.config.schema import ConfigError
from experiments.config.validate import check_clusters, to_dataclass
from experiments.evaluation.responses import FILE as ANSWERS
from experiments.evaluation.responses import Answers, code_digest
from experiments.evaluation.tasks import build_task
from experiments.runs.code import versions
from experiments.runs.experiment import Ending, give_up, record, tell
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError, RunFolder
from experiments.runs.identity import check_profile, settings_id
from experiments.runs.locks import lock_owner
from experiments.runs.resolve import resolve_runs
from experiments.system.console import log_error, log_info
from experiments.system.device import device_name
from experiments.system.distributed import Team, join, own_device, own_share, shares
from experiments.tables.accuracy import show_results

#: Tokens of the prompt whose operations are counted (paper, Figure 1).
PROMPT = 2048


@dataclass
class Options:
    """``experiment.*`` of this experiment: none."""


def run(config: DictConfig) -> int:
    """Score every task asked for that isn't done; returns the exit code.

    Raises:
        ConfigError: a method, or counts of clusters, that the model can't run with. Nothing is written then.
    """
    to_dataclass(Options, config.experiment, "experiment")
    singles = resolve_runs(config)
    for single in singles:
        check_clusters(single)
        check_profile(single)
    method = to_dataclass(load_method(config.method.name), singles[0].method, "method")
    folders = [RunFolder(single) for single in singles]
    try:
        team = join()
        is_open = team.from_leader(lambda: [config.force or not folder.is_done for folder in folders])
    except RunError as error:
        log_error(str(error))
        return Ending.FAILED.code
    todo = [folder for folder, wanted in zip(folders, is_open, strict=True) if wanted]
    for folder in folders:
        if folder not in todo:
            log_info(f"done already: {folder.path} (force=true does it again)")
    endings = _score_all(todo, method, team) if todo else []
    if not team.leads:
        return max((ending.code for ending in endings), default=0)
    elsewhere = [folder for folder, ending in zip(todo, endings, strict=True) if ending is Ending.ELSEWHERE]
    show_results([folder.path for folder in folders if folder not in elsewhere], Path(config.results_dir))
    return max((ending.code for ending in endings), default=0)


def _score_all(folders: list[RunFolder], method: Method, team: Team) -> list[Ending]:
    """Score each folder's task with one loaded model; returns how each ended."""
    try:
        holders = team.from_leader(lambda: [lock_owner(folder.path) for folder in folders])
    except RunError as error:
        return _give_up(folders, str(error), team)
    if None not in holders:  # no model is needed to see that all of them are being worked on
        for folder, holder in zip(folders, holders, strict=True):
            assert holder is not None
            tell(folder, holder)
        return [Ending.ELSEWHERE] * len(folders)
    config = folders[0].config
    source = model_source(config)
    try:
        architecture = load_config(source)
    except ModelError as error:
        return _give_up(folders, str(error), team)
    try:
        method.check(architecture)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from None
    log_info(f"{config.method.name} on {config.model.name}: {', '.join(folder.config.task.name for folder in folders)}")
    if note := method.note(architecture):
        log_info(note)
    try:
        model, tokenizer = team.together(lambda: (load_model(source), load_tokenizer(source)))
    except (ModelError, RunError) as error:
        return _give_up(folders, str(error), team)
    try:
        method.check_weights(model)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from None

    def score_one(index: int) -> dict[str, Any]:
        team.command(index)
        return _score_one(folders[index], method, model, tokenizer, team)

    if team.leads:
        endings = [
            record(folder, functools.partial(score_one, index), until_done=(ANSWERS, *shares(folder.path, team)))
            for index, folder in enumerate(folders)
        ]
        with suppress(RunError):  # one that has ended needn't be told
            team.dismiss()
        return endings
    try:
        team.follow(lambda index: _score_one(folders[index], method, model, tokenizer, team))
    except RunError:  # the leader has ended, or says what went wrong
        return [Ending.FAILED] * len(folders)
    return [Ending.DONE] * len(folders)


def _give_up(folders: list[RunFolder], reason: str, team: Team) -> list[Ending]:
    """The end of runs that can't be started, recorded by the leading process."""
    return give_up(folders, reason) if team.leads else [Ending.FAILED] * len(folders)


def _score_one(folder: RunFolder, method: Method, model: Any, tokenizer: Any, team: Team) -> dict[str, Any]:
    """Score a task, each process its share; the leading one writes the samples. Returns the run's result."""
    from experiments.evaluation.lm import score

    config = folder.config
    started = time.perf_counter()
    about = {
        "run_id": folder.id,
        "device": device_name(input_device(model)),
        "device_map": model_source(config).device_map,
        "dtype": str(model.dtype),
        "revision": getattr(model.config, "_commit_hash", None),  # of weights from the hub
        "versions": versions(),
        "code": code_digest(),
    }

    def prepare() -> tuple[Answers, dict[str, Any]]:
        others = [folder.path / name for name in (ANSWERS, *shares(folder.path, team))]
        own = folder.path / own_share(team.rank)
        own.parent.mkdir(parents=True, exist_ok=True)  # on another machine the leader's may not be there
        return Answers(own, about, [other for other in others if other != own]), build_task(config.task)

    answers, task = team.together(prepare)
    with closing(answers):
        if answers.left_aside:
            log_info(f"answers of an earlier start can't be used, made with another {', '.join(answers.left_aside)}")
        scores, samples, ledger = score(
            model,
            tokenizer,
            method,
            task,
            batch_size=config.batch_size,
            limit=config.limit,
            num_fewshot=config.task.num_fewshot,
            answers=answers,
            progress=folder.progress if team.leads else None,
            team=team,
        )
    seconds = time.perf_counter() - started + answers.seconds
    if team.leads:
        write_samples(folder.path / "samples.parquet", samples)
    return {
        "experiment": config.experiment.name,
        "method": config.method.name,
        "model": config.model.name,
        "task": config.task.name,
        "metric": config.task.metric,
        **scores,
        "savings": {
            "kind": method.saving,
            **ledger.per_sequence(),
            "heads_kept": method.heads_kept(model.config),
        },
        "flops": {
            "tokens": PROMPT,
            "method": method_flops(model, method, PROMPT),
            "mha": method_flops(model, Mha(), PROMPT),
        },
        "seconds": round(seconds, 3),
        "processes": team.size,
        "resumed": answers.restored,
        "seed": config.seed,
        "settings_id": settings_id(config),
        "run_id": folder.id,
        "device": describe_devices(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def model_source(config: DictConfig) -> ModelSource:
    """What :mod:`chai.models` needs of a configuration."""
    model = config.model
    plain: Any = OmegaConf.to_container(model, resolve=True)
    return ModelSource(
        name=model.name,
        hub_id=model.hub_id,
        revision=model.revision,
        path=model.path,
        dtype=model.dtype,
        device=own_device(config.device, plain["device_map"]),
        device_map=plain["device_map"],
        safetensors_only=model.safetensors_only,
        random_init=model.random_init,
        architecture=plain["architecture"],
        seed=config.seed,
    )


def write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    """Per-item outcomes as Parquet, atomically."""
    import pandas as pd

    write_atomically(path, lambda temporary: pd.DataFrame(samples).to_parquet(temporary, index=False))
