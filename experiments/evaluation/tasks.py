"""Tasks of lm-evaluation-harness on data from the hub or local files; prompts and scoring are the harness's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset, DatasetDict, load_dataset
from lm_eval.tasks._yaml_loader import load_yaml
from omegaconf import DictConfig

from experiments.config.compose import data_path
from experiments.runs.folder import RunError
from experiments.runs.jsonl import read_jsonl


def build_task(task: DictConfig) -> dict[str, Any]:
    """Return lm-eval's built-in definition of the task, on local data where given."""
    definition = Path(lm_eval.__file__).parent / "tasks" / task.harness
    if not definition.is_file():
        raise RunError(f"task '{task.name}': lm-eval {lm_eval.__version__} has no definition {task.harness}")
    spec = load_yaml(definition)
    spec.pop("tag", None)
    spec["task"] = task.name
    path = data_path(task)
    if path is None:
        data = load_from_hub(spec, task)
    else:
        rows = list(read_jsonl(path, list(task.columns)))
        if not rows:
            raise RunError(f"the task's data file {path} has no items")
        for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
            spec[split] = None
        spec[f"{task.split}_split"] = task.split
        data = DatasetDict({task.split: Dataset.from_list(rows)})
    spec["custom_dataset"] = lambda **_: data
    return spec


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
