"""Tasks of lm-evaluation-harness on data from the hub or local files; prompts and scoring are the harness's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lm_eval
import pyarrow
from datasets import Dataset, DatasetDict, load_dataset
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY
from lm_eval.tasks._yaml_loader import load_yaml
from omegaconf import DictConfig

from experiments.config.compose import data_path
from experiments.config.schema import ConfigError
from experiments.runs.folder import RunError
from experiments.runs.jsonl import read_table

#: Columns that say which choice is right.
LABELS = frozenset({"label", "answerKey"})


def build_task(task: DictConfig) -> dict[str, Any]:
    """Return lm-eval's built-in definition of the task, on local data where given."""
    spec = load_definition(task)
    spec.pop("tag", None)
    spec["task"] = task.name
    path = data_path(task)
    if path is None:
        data = load_from_hub(spec, task)
    else:
        rows = read_items(path, list(task.columns))
        for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
            spec[split] = None
        spec[f"{task.split}_split"] = task.split
        data = DatasetDict({task.split: _to_dataset(rows, path)})
    spec["custom_dataset"] = lambda **_: data
    return spec


def load_definition(task: DictConfig) -> dict[str, Any]:
    """Return lm-eval's built-in definition of the task."""
    definition = Path(lm_eval.__file__).parent / "tasks" / task.harness
    if not definition.is_file():
        raise RunError(f"task '{task.name}': lm-eval {lm_eval.__version__} has no definition {task.harness}")
    spec: dict[str, Any] = load_yaml(definition)
    return spec


def check_metric(task: DictConfig) -> None:
    """Refuse a metric that the task's definition does not have, before a model is loaded."""
    try:
        spec = load_definition(task)
    except RunError:  # recorded as the run's failure when the task is built
        return
    listed = [entry["metric"] for entry in spec.get("metric_list") or ()]
    valid = listed or DEFAULT_METRIC_REGISTRY.get(spec.get("output_type", "generate_until"), [])
    names = [getattr(metric, "__name__", str(metric)) for metric in valid]  # a definition may name a function
    if names and task.metric not in names:
        raise ConfigError(f"task.metric is '{task.metric}'; valid for task '{task.name}': {', '.join(names)}")


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
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()
        raise RunError(
            f"cannot load the data of task '{task.name}' ({spec['dataset_path']}) from the hub: {reason[0]} "
            f"(offline: task.data_dir=FOLDER with {task.data_file})"
        ) from None


def _to_dataset(rows: list[dict[str, Any]], path: Path) -> Dataset:
    try:
        return Dataset.from_list(rows)
    except pyarrow.ArrowException as error:  # types that differ deeper inside
        raise RunError(f"the items of {path} do not form a table: {str(error).splitlines()[0]}") from None
