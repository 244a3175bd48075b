"""``experiment=accuracy``: score tasks under a method; one run folder for each task (paper, section 4.2)."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from chai.flops import method_flops
from chai.methods import Mha, load_method
from chai.methods.base import Method
from chai.models import ModelError, ModelSource, load_config, load_model, load_tokenizer
from experiments.answers import FILE as ANSWERS
from experiments.answers import Answers, code_digest
from experiments.config import ConfigError, check_clusters, to_dataclass
from experiments.console import say
from experiments.identity import check_profile
from experiments.lifecycle import Ending, give_up, record, tell
from experiments.locks import is_locked
from experiments.machine import device_name
from experiments.planning import settled
from experiments.runs import RunFolder, settings_id, versions, write_atomically
from experiments.summary import show_results
from experiments.tasks import build_task

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
    singles = settled(config)
    for single in singles:
        check_clusters(single)
        check_profile(single)
    method = to_dataclass(load_method(config.method.name), singles[0].method, "method")
    folders = [RunFolder(single) for single in singles]
    todo = [folder for folder in folders if config.force or not folder.is_done]
    for folder in folders:
        if folder not in todo:
            say(f"done already: {folder.path} (force=true does it again)")
    endings = _score_all(todo, method) if todo else []
    elsewhere = [folder for folder, ending in zip(todo, endings, strict=True) if ending is Ending.ELSEWHERE]
    show_results([folder.path for folder in folders if folder not in elsewhere], Path(config.results_dir))
    return max((ending.code for ending in endings), default=0)


def _score_all(folders: list[RunFolder], method: Method) -> list[Ending]:
    """Score each folder's task with one loaded model; returns how each ended."""
    holders = [is_locked(folder.path) for folder in folders]
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
        return give_up(folders, str(error))
    try:
        method.check(architecture)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from None
    say(f"{config.method.name} on {config.model.name}: {', '.join(folder.config.task.name for folder in folders)}")
    if note := method.note(architecture):
        say(note)
    try:
        model, tokenizer = load_model(source), load_tokenizer(source)
    except ModelError as error:
        return give_up(folders, str(error))
    try:
        method.check_weights(model)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from None
    return [
        record(
            folder,
            lambda folder=folder: _score_one(folder, method, model, tokenizer),  # type: ignore[misc]
            until_done=(ANSWERS,),
        )
        for folder in folders
    ]


def _score_one(folder: RunFolder, method: Method, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Score a task; writes the samples, returns the run's result."""
    from experiments.scoring import score

    config = folder.config
    started = time.perf_counter()
    about = {
        "run_id": folder.id,
        "device": device_name(model.device),
        "device_map": config.model.device_map,
        "dtype": str(model.dtype),
        "revision": getattr(model.config, "_commit_hash", None),  # of weights from the hub
        "versions": versions(),
        "code": code_digest(),
    }
    with closing(Answers(folder.path / ANSWERS, about)) as answers:
        if answers.left_aside:
            say(f"answers of an earlier start can't be used, made with another {', '.join(answers.left_aside)}")
        scores, samples, ledger = score(
            model,
            tokenizer,
            method,
            build_task(config.task),
            batch_size=config.batch_size,
            limit=config.limit,
            num_fewshot=config.task.num_fewshot,
            answers=answers,
            progress=folder.progress,
        )
    seconds = time.perf_counter() - started + answers.seconds
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
        "resumed": answers.restored,
        "seed": config.seed,
        "settings_id": settings_id(config),
        "run_id": folder.id,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def model_source(config: DictConfig) -> ModelSource:
    """What :mod:`chai.models` needs of a configuration."""
    from omegaconf import OmegaConf

    model = config.model
    return ModelSource(
        name=model.name,
        hub_id=model.hub_id,
        revision=model.revision,
        path=model.path,
        dtype=model.dtype,
        device=config.device,
        device_map=model.device_map,
        safetensors_only=model.safetensors_only,
        random_init=model.random_init,
        architecture=OmegaConf.to_container(model.architecture),  # type: ignore[arg-type]
        seed=config.seed,
    )


def write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    """Per-item outcomes as Parquet, atomically."""
    import pandas as pd

    write_atomically(path, lambda temporary: pd.DataFrame(samples).to_parquet(temporary, index=False))
