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
#: Keys of the model's section that are no conditions: where it is stored, and what its name and fingerprint imply.
NO_SETTING = ("path", "device_map", "architecture")


@dataclass(frozen=True, eq=False)
class Score:
    """A method's score on a task."""

    run: Run
    config: dict[str, Any]  # config.yaml
    samples: pd.DataFrame  # samples.parquet: doc_id, doc_hash and the metrics, a row for each item

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.run.method

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.run.result["task"])

    @property
    def n(self) -> int:
        """Number of items."""
        return self.run.result["n"]

    @property
    def metric(self) -> str:
        """The reported metric: ``acc_norm``, or ``acc`` for BoolQ, as in the paper."""
        return str(self.run.result["metric"])

    @property
    def value(self) -> float:
        """The score, between 0 and 1."""
        return float(self.run.result["metrics"][self.metric])

    @property
    def stderr(self) -> float | None:
        """Standard error of the score; ``None`` for a single item."""
        error = self.run.result["stderr"].get(self.metric)
        return None if error is None else float(error)

    @property
    def saved(self) -> float:
        """Share of the KV cache's bytes that is saved."""
        savings = self.run.result["savings"]
        return 1 - float(savings["kv_bytes"]) / float(savings["kv_bytes_mha"])

    @property
    def saving(self) -> str:
        """Kind of saving: ``real``, ``simulated`` or ``none``."""
        return str(self.run.result["savings"]["kind"])

    @property
    def settings_id(self) -> str:
        """Digest of the configuration without the method: runs with the same can be compared."""
        return str(self.run.result["settings_id"])

    @property
    def settings(self) -> dict[str, Any]:
        """Hyper-parameters of the method."""
        return {key: value for key, value in self.config["method"].items() if key != "name"}

    @property
    def conditions(self) -> dict[str, Any]:
        """Everything but the method and the task that was set: common to all runs of a table."""
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
    scores = []
    for run in results.runs(ACCURACY):
        try:
            scores.append(_load(run))
        except SkippedRun as reason:
            results.skipped[run.folder] = str(reason)
    return scores


def _load(run: Run) -> Score:
    config = read_config(run.folder)
    samples = read_table(run.folder / "samples.parquet", ("doc_id", "doc_hash", run.result["metric"]))
    samples = samples[[name for name in ("doc_id", "doc_hash", "acc", "acc_norm") if name in samples]]
    score = Score(run, config, samples)
    # Evaluate each number once, so that a corrupt result.json shows here and not in a table.
    try:
        value, share, _, _ = score.value, score.saved, score.stderr, score.saving
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        raise SkippedRun("result.json lacks a score or savings that are numbers") from None
    if not 0 <= value <= 1 or share > 1:
        raise SkippedRun(f"result.json is impossible: a score of {value}, {share:.3g} of the KV cache saved")
    if len(samples) != score.n or abs(samples[score.metric].mean() - value) > 1e-6:
        raise SkippedRun("samples.parquet doesn't give the score in result.json")
    return score


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run's ``config.yaml``.

    Raises:
        SkippedRun: it is missing, corrupt, or lacks a section.
    """
    return read_yaml(folder / "config.yaml", ("method", "model", "task"))
