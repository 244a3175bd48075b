"""Finished accuracy runs with their settings and each item's outcome."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.results.files import SkippedRun, read_table, read_yaml
from analysis.results.runs import Results, Run, RunQuery

ACCURACY = RunQuery(
    "accuracy",
    fields=("task", "metric", "metrics", "stderr", "n", "savings", "settings_id"),
    command="python run.py -m paper=figure1",
    small_command="python run.py -m paper=micro model=tiny",
)
#: Keys of the model's section that do not affect results, or follow from its name and fingerprint.
NO_SETTING = ("path", "device_map", "architecture")


@dataclass(frozen=True, eq=False)
class Score:
    """A method's score on a task."""

    run: Run
    config: dict[str, Any]  # config.yaml
    samples: pd.DataFrame  # samples.parquet: doc_id, doc_hash and the metrics, a row for each item
    method: str
    settings: dict[str, Any]  # hyper-parameters of the method
    settings_id: str  # digest of the configuration without the method: runs with the same can be compared
    task: str
    n: int  # items
    metric: str  # acc_norm, or acc for BoolQ, as in the paper
    value: float  # the score, between 0 and 1
    stderr: float | None  # its standard error; None for a single item
    saved: float  # share of the KV cache's bytes that is saved
    saving: str  # kind of saving: real, simulated or none

    @property
    def conditions(self) -> dict[str, Any]:
        """Configuration without the method and the task: common to all runs of a table."""
        config = self.config
        general = {key: config.get(key) for key in ("limit", "seed", "batch_size")}
        model = {f"model.{key}": value for key, value in config["model"].items() if key not in NO_SETTING}
        return general | {"task.num_fewshot": config["task"].get("num_fewshot", 0)} | model

    @property
    def conditions_id(self) -> str:
        """The conditions as a string, to group runs by."""
        return json.dumps(self.conditions, sort_keys=True, default=str)


def load_scores(results: Results) -> list[Score]:
    """Return all finished accuracy runs; add those that cannot be used to ``results.skipped``."""
    loaded = (results.attempt(run.folder, _load, run) for run in results.runs(ACCURACY))
    return [score for score in loaded if score is not None]


def _load(run: Run) -> Score:
    result, config = run.result, read_config(run.folder)
    metric, n = str(result["metric"]), result["n"]
    samples = read_table(run.folder / "samples.parquet", ("doc_id", "doc_hash", metric))
    names = dict.fromkeys(("doc_id", "doc_hash", "acc", "acc_norm", metric))
    samples = samples[[name for name in names if name in samples]]
    try:
        value, error = float(result["metrics"][metric]), result["stderr"].get(metric)
        stderr = None if error is None else float(error)
        saved = 1 - float(result["savings"]["kv_bytes"]) / float(result["savings"]["kv_bytes_mha"])
        saving = str(result["savings"]["kind"])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        raise SkippedRun("result.json has no numeric score or savings") from None
    if not 0 <= value <= 1 or saved > 1:
        raise SkippedRun(f"result.json is impossible: a score of {value}, {saved:.3g} of the KV cache saved")
    if len(samples) != n or abs(samples[metric].mean() - value) > 1e-6:
        raise SkippedRun("samples.parquet does not match the score in result.json")
    settings = {key: value for key, value in config["method"].items() if key != "name"}
    settings_id, task = str(result["settings_id"]), str(result["task"])
    return Score(run, config, samples, run.method, settings, settings_id, task, n, metric, value, stderr, saved, saving)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run's ``config.yaml``; raises :class:`SkippedRun` if it is missing, corrupt, or lacks a section."""
    return read_yaml(folder / "config.yaml", ("method", "model", "task"))
