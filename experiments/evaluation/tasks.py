"""Tasks of lm-evaluation-harness on data from the hub or local files; prompts and scoring are the harness's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.config.compose import data_path
from experiments.runs.folder import RunError


def build_task(task: DictConfig) -> dict[str, Any]:
    """The task as lm-eval's ``simple_evaluate`` takes it: its built-in definition, on local data where given.

    Raises:
        RunError: no such definition, or local data that can't be read.
    """
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    definition = Path(lm_eval.__file__).parent / "tasks" / task.harness
    if not definition.is_file():
        raise RunError(f"task '{task.name}': lm-eval {lm_eval.__version__} has no definition {task.harness}")
    spec = load_yaml(definition)
    spec.pop("tag", None)
    spec["task"] = task.name
    path = data_path(task)
    if path is None:
        data = from_hub(spec, task)
    else:
        from datasets import Dataset, DatasetDict

        for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
            spec[split] = None
        spec[f"{task.split}_split"] = task.split
        data = DatasetDict({task.split: Dataset.from_list(read_rows(path, list(task.columns)))})
    spec["custom_dataset"] = lambda **_: data
    return spec


def from_hub(spec: dict[str, Any], task: DictConfig) -> Any:
    """The data that the task's definition names, from the hub or its local cache.

    Raises:
        RunError: it can't be had.
    """
    from datasets import load_dataset

    kwargs = {
        key: value for key, value in (spec.pop("dataset_kwargs", None) or {}).items() if key != "trust_remote_code"
    }
    try:
        return load_dataset(spec["dataset_path"], spec.get("dataset_name"), **kwargs)
    except Exception as error:  # the hub, the network and the file formats fail in many unrelated types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"can't get the data of task '{task.name}' ({spec['dataset_path']}) from the hub: {reason[0]} "
            f"(offline: task.data_dir=FOLDER with {task.data_file})"
        ) from None


def read_rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """The items of a JSONL file.

    Raises:
        RunError: the file can't be read, has no items, or has a line that is no JSON object with these columns.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"can't read the task's data file {path}: {reason}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}, line {number}, is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise RunError(f"{path}, line {number}, is no JSON object")
        if missing := [column for column in columns if column not in row]:
            raise RunError(
                f"{path}, line {number}, has no {', '.join(missing)}; expected columns: {', '.join(columns)}"
            )
        rows.append(row)
    if not rows:
        raise RunError(f"the task's data file {path} has no items")
    return rows
