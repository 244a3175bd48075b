"""``experiment=accuracy``: score tasks under a method; one run folder for each task (paper, section 4.2)."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from chai.devices import describe_devices
from chai.flops import method_flops
from chai.methods import Mha, load_method
from chai.methods.base import Method
from chai.models import ModelError, ModelSource, load_config, load_model, load_tokenizer
from experiments.config import ConfigError, check_clusters, to_dataclass
from experiments.console import complain, say
from experiments.identity import check_profile, settle_identity
from experiments.runs import RunError, RunFolder, settings_id, versions, write_atomically
from experiments.summary import show_results
from experiments.tasks import build_task, members

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
    config = config.copy()
    singles = members(config)
    for single in singles:
        settle_identity(single)
        check_clusters(single)
        check_profile(single)
    method = to_dataclass(load_method(config.method.name), singles[0].method, "method")
    folders = [RunFolder(single) for single in singles]
    todo = [folder for folder in folders if config.force or not folder.is_done]
    for folder in folders:
        if folder not in todo:
            say(f"done already: {folder.path} (force=true does it again)")
    failures = _score_all(todo, method) if todo else 0
    show_results([folder.path for folder in folders], Path(config.results_dir))
    return 1 if failures else 0


def _score_all(folders: list[RunFolder], method: Method) -> int:
    """Score each folder's task with one loaded model; returns how many failed."""
    config = folders[0].config
    source = model_source(config)
    try:
        architecture = load_config(source)
    except ModelError as error:
        return _fail_all(folders, str(error))
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
        return _fail_all(folders, str(error))
    try:
        method.check_weights(model)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from None
    failures = 0
    for folder in folders:
        try:
            folder.start()
            _score_one(folder, method, model, tokenizer)
        except RunError as error:
            failures += _fail_all([folder], str(error))
        except KeyboardInterrupt:
            folder.fail("interrupted")
            raise
        except Exception as error:  # whatever it was: the run's own status tells, and the other tasks go on
            traceback.print_exc()
            failures += _fail_all([folder], f"{type(error).__name__}: {error}")
    return failures


def _score_one(folder: RunFolder, method: Method, model: Any, tokenizer: Any) -> None:
    from experiments.scoring import score

    config = folder.config
    started = time.perf_counter()
    scores, samples, ledger = score(
        model,
        tokenizer,
        method,
        build_task(config.task),
        batch_size=config.batch_size,
        limit=config.limit,
        num_fewshot=config.task.num_fewshot,
    )
    seconds = time.perf_counter() - started
    write_samples(folder.path / "samples.parquet", samples)
    folder.finish(
        {
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
            "seed": config.seed,
            "settings_id": settings_id(config),
            "run_id": folder.id,
            "device": describe_devices(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": versions(),
        }
    )


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
        device=config.device,
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


def _fail_all(folders: list[RunFolder], reason: str) -> int:
    """Record one reason as the end of several runs; returns how many.

    A run that is done and wasn't started again (``force=true``, but no model to do it with) keeps its result.
    """
    complain(reason)
    for folder in folders:
        try:
            if folder.is_done:
                continue
            if not folder.path.exists():
                folder.start()
            folder.fail(reason)
        except (OSError, RunError) as error:
            complain(str(error))
    return len(folders)
