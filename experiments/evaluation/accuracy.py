"""``experiment=accuracy``: score tasks under a method; one run folder for each task (paper, section 4.2)."""

from __future__ import annotations

import functools
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai.loading import ModelError, ModelSource, load_config, load_model, load_tokenizer
from chai.methods.base import Method
from chai.patching.devices import describe_devices
from experiments.config.remedies import with_remedy
from experiments.config.schema import ConfigError
from experiments.config.validate import to_dataclass
from experiments.evaluation.groups import group_result
from experiments.evaluation.lm import MethodLM, score
from experiments.evaluation.passkey import COLUMNS
from experiments.evaluation.responses import FILE, worker_files
from experiments.evaluation.resume import open_responses
from experiments.evaluation.savings import count_flops
from experiments.evaluation.tasks import build_task, needs_tokenizer, refusal, shown_metric
from experiments.runs import experiment
from experiments.runs.experiment import Outcome
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunFolder
from experiments.runs.identity import settings_id
from experiments.runs.locks import lock_owner
from experiments.runs.model import loaded_architecture, model_source
from experiments.system.console import log_error, log_info
from experiments.system.distributed import DistributedError, ProcessGroup, init_distributed
from experiments.tables.accuracy import show_results
from experiments.tables.passkey import show_lengths


@dataclass
class Options:
    """``experiment.*``: this experiment has no options."""


def run(config: DictConfig) -> int:
    """Score every task that is not complete; return the exit code."""
    to_dataclass(Options, config.experiment, "experiment")
    folders = experiment.checked_folders(config)
    method = experiment.build_method(folders[0].config)
    # Skip what is complete; rank 0 decides for all processes.
    try:
        group = init_distributed(experiment.describe_error)
        states = group.broadcast([(experiment.needs_work(folder), lock_owner(folder.path)) for folder in folders])
    except DistributedError as error:
        log_error(str(error))
        return Outcome.FAILED.code
    pending = {folder: owner for folder, (is_pending, owner) in zip(folders, states, strict=True) if is_pending}
    if None in pending.values():
        try:
            outcomes = Scorer(list(pending), method, group).score_all()
        except (ModelError, DistributedError) as error:
            outcomes = dict.fromkeys(pending, experiment.mark_failed(list(pending), with_remedy(error)))
    else:  # no model is needed to see that other processes work on all of them
        outcomes = dict.fromkeys(pending, Outcome.LOCKED)
        for folder, owner in pending.items():
            log_info(f"skipping: locked by {owner}: {folder.path}")
    if group.is_main_process:
        paths = [folder.path for folder in folders if outcomes.get(folder) is not Outcome.LOCKED]
        show_results(paths, Path(config.results_dir), functools.partial(group_result, config.task))
        show_lengths(paths, Path(config.results_dir))
    return max((outcome.code for outcome in outcomes.values()), default=0)


class Scorer:
    """A model that scores the tasks of several runs, together with the other processes of its group."""

    def __init__(self, folders: list[RunFolder], method: Method, group: ProcessGroup) -> None:
        self.folders, self.method, self.group = folders, method, group
        config = folders[0].config
        source = model_source(config)
        architecture = load_config(source)
        experiment.check_method(method, architecture)
        tasks = ", ".join(folder.config.task.name for folder in folders)
        log_info(f"{config.method.name} on {config.model.name}: {tasks}")
        needs_one = any(needs_tokenizer(folder.config.task) for folder in folders)
        tokenizer = group.run_on_all(lambda: load_tokenizer(source)) if needs_one else None
        reasons = [refusal(folder.config.task, architecture, tokenizer) for folder in folders]
        self.refused = {folder: why for folder, why in zip(folders, group.broadcast(reasons), strict=True) if why}
        if len(self.refused) == len(folders):
            return  # without having loaded the model
        self.model, self.tokenizer = group.run_on_all(lambda: load_both(source))
        try:
            method.check_weights(self.model)
        except ValueError as error:
            raise ConfigError(f"method: {with_remedy(error)}") from None

    def score_all(self) -> dict[RunFolder, Outcome]:
        """Score all tasks: rank 0 one after the other, the others their shards of those that rank 0 names."""
        if not self.group.is_main_process:
            try:
                self.group.worker_loop(self.score_task)
            except DistributedError:
                return dict.fromkeys(self.folders, Outcome.FAILED)
            return dict.fromkeys(self.folders, Outcome.DONE)
        outcomes = {}
        for index, folder in enumerate(self.folders):
            if folder in self.refused:
                outcomes[folder] = experiment.mark_failed([folder], self.refused[folder])
                continue
            files = (FILE, *worker_files(folder.path, self.group.world_size))
            work = functools.partial(self.score_task, index)
            outcomes[folder] = experiment.run_lifecycle(folder, work, until_done=files)
        with suppress(DistributedError):  # a process that has died needs no shutdown
            self.group.shutdown()
        return outcomes

    def score_task(self, index: int) -> dict[str, Any]:
        """Score the task of a run, this process its shard; return the run's part of ``result.json``."""
        folder, method, group = self.folders[index], self.method, self.group
        config = folder.config
        if group.is_main_process:
            group.send_command(index)
        # Open the saved responses and the task; no process starts to score before all have succeeded.
        began = time.perf_counter()
        saved = open_responses(folder, self.model, group)
        with closing(saved):
            spec = build_task(config.task, self.tokenizer)
            group.all_gather(None)
            if saved.discarded:
                log_info(f"discarding saved responses: {', '.join(saved.discarded)} changed since the last attempt")
            progress = folder.progress if group.is_main_process else None
            lm = MethodLM(self.model, self.tokenizer, method, config.batch_size, saved, progress, group, config.seed)
            # In conf/, 0 stands for the definition's own number; for a registered task it is 0.
            shots = config.task.num_fewshot if config.task.registered else config.task.num_fewshot or None
            scores, samples = score(
                lm,
                spec,
                limit=config.limit,
                num_fewshot=shots,
                apply_chat_template=bool(config.task.apply_chat_template),
                columns=COLUMNS if config.task.key is not None else (),
            )
        seconds = time.perf_counter() - began + saved.seconds
        if group.is_main_process:
            frame = pd.DataFrame(samples)
            write_atomically(folder.path / "samples.parquet", lambda path: frame.to_parquet(path, index=False))
        return {
            "metric": shown_metric(config.task, spec, list(scores["metrics"])),
            **scores,
            "savings": {"kind": method.saving, **lm.savings(), "heads_kept": method.heads_kept(self.model.config)},
            **method.result_fields(self.model.config),
            "flops": count_flops(method, self.model),
            "seconds": round(seconds, 3),
            "processes": group.world_size,
            "resumed": saved.restored,
            "settings_id": settings_id(config),
            "architecture": loaded_architecture(self.model.config, config),
            "device": describe_devices(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def load_both(source: ModelSource) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer (ModelError: one cannot be loaded, or lm-eval cannot use the tokenizer)."""
    model, tokenizer = load_model(source), load_tokenizer(source)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of '{source.name}' has neither a bos_token nor an eos_token, of which lm-eval needs one "
            "(in its tokenizer_config.json)"
        )
    return model, tokenizer
