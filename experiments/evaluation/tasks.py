"""Tasks of lm-evaluation-harness on data from the hub or local files; prompts and scoring are the harness's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lm_eval
import pyarrow
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks._yaml_loader import load_yaml
from omegaconf import DictConfig
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from experiments.config.compose import data_path, fewshot_path, split_path
from experiments.config.schema import ConfigError
from experiments.evaluation import passkey
from experiments.runs.definitions import (
    FILE_FORMATS,
    SPLITS,
    check_definition,
    check_filters,
    choose_metric,
    data_files,
    metric_keys,
    scored_split,
    split_files,
)
from experiments.runs.folder import RunError
from experiments.runs.jsonl import read_table
from experiments.runs.registry import find_definition
from experiments.system.console import log_info

#: Columns that say which choice is right.
LABELS = frozenset({"label", "answerKey"})
#: Tokens that lm-eval generates where a task does not say how many.
MAX_NEW_TOKENS = 256


def load_definition(task: DictConfig) -> dict[str, Any]:
    """Return lm-eval's definition of a task, with its functions imported."""
    if task.key is not None:
        return passkey.definition(task)
    if task.registered:
        try:
            spec = find_definition(task).load(resolve=True)
        except Exception as error:  # the code of the task's folder runs here
            raise RunError(
                f"task '{task.name}': cannot load its definition: {type(error).__name__}: {_first_line(error)}"
            ) from None
    else:
        path = Path(lm_eval.__file__).parent / "tasks" / task.harness
        if not path.is_file():
            raise RunError(f"task '{task.name}': lm-eval {lm_eval.__version__} has no definition {task.harness}")
        spec = load_yaml(path)
    spec.pop("tag", None)
    spec["task"] = task.name
    return spec


def build_task(task: DictConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Return lm-eval's definition of the task, on local data where given.

    The tokenizer is needed where :func:`needs_tokenizer` says so: a passkey task's items are made for it.
    """
    spec = load_definition(task)
    if task.key is not None:
        assert tokenizer is not None
        made = DatasetDict({spec["test_split"]: Dataset.from_list(passkey.make_items(task, tokenizer))})
        spec["custom_dataset"] = lambda **_: made
    elif data_path(task) is not None:
        _use_files(spec, {task.split: data_path(task)}, list(task.columns))
        if (examples := fewshot_path(task)) is not None:
            rows = _read_rows(examples, list(task.columns))
            data = DatasetDict({**spec["custom_dataset"](), "train": rows})
            spec |= {"fewshot_split": "train", "custom_dataset": lambda **_: data}
    elif task.data_dir is not None:
        _use_splits(spec, task)
    elif "class" not in spec and spec.get("custom_dataset") is None:
        data = load_from_hub(spec, task)
        spec["custom_dataset"] = lambda **_: data
    return spec


def _use_splits(spec: dict[str, Any], task: DictConfig) -> None:
    """Read a registered task's splits from ``NAME_SPLIT.jsonl`` in ``task.data_dir``."""
    needed = scored_split(spec)
    files = dict(sorted(split_files(task, spec))) | {needed: split_path(task, needed)}
    kept = {key: spec[key] for key in SPLITS if spec.get(key) in files}
    shots = spec.get("num_fewshot") if task.num_fewshot is None else task.num_fewshot
    if shots and not kept.keys() - {"test_split"}:
        wanted = spec.get("fewshot_split") or spec.get("training_split") or "train"
        raise RunError(f"task '{task.name}' needs few-shot examples: no file {split_path(task, wanted)}")
    _use_files(spec, files, [])
    spec |= kept


def _use_files(spec: dict[str, Any], files: dict[str, Path], columns: list[str]) -> None:
    """Let a definition take its splits from JSONL files, the only split being the one that is scored."""
    data = DatasetDict({split: _read_rows(path, columns) for split, path in files.items()})
    for key in SPLITS:
        spec[key] = None
    if len(files) == 1:
        (split,) = files
        spec[f"{split}_split" if f"{split}_split" in SPLITS else "test_split"] = split
    spec.pop("dataset_kwargs", None)
    spec["custom_dataset"] = lambda **_: data


def _read_rows(path: Path, columns: list[str]) -> Dataset:
    """Read the items of a JSONL file as a table."""
    try:
        return Dataset.from_list(read_items(path, columns))
    except pyarrow.ArrowException as error:  # types that differ deeper inside
        raise RunError(f"the items of {path} do not form a table: {str(error).splitlines()[0]}") from None


def read_items(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Return the items of a local data file; a RunError names the line that cannot be scored."""
    items = read_table(path, columns)
    if not items:
        raise RunError(f"the task's data file {path} has no items")
    for number, item in items:
        for column in LABELS.intersection(columns):
            if re.fullmatch(r"\s*(-\d+)?\s*", str(item[column])):
                raise RunError(
                    f"{path}, line {number}: '{column}' is {item[column]!r}, a hidden label (of a test split), "
                    "which cannot be scored; valid: the label of a choice"
                )
    return [item for _, item in items]


def load_from_hub(spec: dict[str, Any], task: DictConfig) -> Any:
    """Load the data that the task's definition names, from the hub or its local cache."""
    kwargs = spec.pop("dataset_kwargs", None) or {}
    kwargs.pop("trust_remote_code", None)
    try:
        return load_dataset(spec["dataset_path"], spec.get("dataset_name"), **kwargs)
    except Exception as error:  # the hub, the network and the file formats fail in many unrelated types
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        source, reason = spec.get("dataset_path"), f"{type(cause).__name__}: {_first_line(cause)}"
        if source in FILE_FORMATS:
            raise RunError(f"cannot read the data of task '{task.name}' ({source}): {reason}") from None
        raise RunError(
            f"cannot load the data of task '{task.name}' ({source}) from the hub: {reason} "
            f"(offline: task.data_dir=FOLDER with {task.data_file or f'{task.name}_{scored_split(spec)}.jsonl'})"
        ) from None


def needs_tokenizer(task: DictConfig) -> bool:
    """Return whether the model's tokenizer is needed to check a task, or to make its items."""
    return bool(task.apply_chat_template) or task.key is not None


def refusal(task: DictConfig, architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return why a task cannot be scored with a model, as far as is known before its weights and data are loaded.

    The tokenizer is needed where :func:`needs_tokenizer` says so.
    """
    try:
        spec = load_definition(task)
        check_definition(task, spec)
        if "class" not in spec:
            check_filters(task.name, spec)
        _check_files(task, spec)
        _check_prompts(task, spec, architecture, tokenizer)
        if task.key is not None:
            assert tokenizer is not None
            passkey.check(task, architecture, tokenizer)
    except (ConfigError, RunError) as error:
        return str(error)
    return None


def _check_files(task: DictConfig, spec: dict[str, Any]) -> None:
    """Raise a RunError for a file that the definition takes its data from and that is missing."""
    if task.data_dir is None and spec.get("custom_dataset") is None and spec.get("dataset_path") in FILE_FORMATS:
        for file in data_files(spec):
            if not file.is_file():
                raise RunError(f"task '{task.name}': data file {file} of its definition does not exist")


def _check_prompts(
    task: DictConfig, spec: dict[str, Any], architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Raise a ConfigError where the model has no room to generate, no chat template, or the task fixes its examples."""
    if task.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("task.apply_chat_template=true, but the model's tokenizer has no chat template")
    if task.num_fewshot and spec.get("num_fewshot") == 0:
        raise ConfigError(
            f"task '{task.name}' is defined with num_fewshot 0, which lm-eval keeps; valid: task.num_fewshot=0"
        )
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if spec.get("output_type", "generate_until") == "generate_until" and "class" not in spec and positions:
        kwargs = normalize_gen_kwargs(spec.get("generation_kwargs") or {}, MAX_NEW_TOKENS)
        if kwargs["max_gen_toks"] >= positions:
            raise ConfigError(
                f"task '{task.name}' generates up to {kwargs['max_gen_toks']} tokens, and the model has {positions} "
                "positions for them and the prompt; set fewer: task.overrides='{generation_kwargs: {...}}'"
            )


def shown_metric(task: DictConfig, spec: dict[str, Any], measured: list[str]) -> str:
    """Return the key of the metric to show, one of those ``measured``; a RunError if there are none.

    Code of a task may define its metrics, so that a wrong name is known only now: the first is shown, with a note.
    """
    if not measured:
        raise RunError(f"task '{task.name}' has no metric that is a number")
    try:
        chosen = choose_metric(task.name, measured if "class" in spec else metric_keys(spec), task.metric)
    except ConfigError as error:
        log_info(f"{error}; shown: {measured[0]}")
        return measured[0]
    if chosen not in measured:
        log_info(f"task '{task.name}' did not measure {chosen}; shown: {measured[0]}")
        return measured[0]
    return chosen


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
