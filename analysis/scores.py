"""Finished accuracy runs with their settings and each item's outcome (fields: docs/results.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml

from analysis.saved import LeftOut, Results, Run

EXPERIMENT = "accuracy"
#: The same as yaml.safe_load, in C where there is one: a results folder has hundreds of configurations.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FIELDS = ("task", "metric", "metrics", "stderr", "n", "savings", "settings_id")
#: Of the model's section, what says only where it lay; and what its name and fingerprint say already.
NO_SETTING = ("path", "device_map", "architecture")


@dataclass(frozen=True, eq=False)
class Score:
    """A task's score under a method.

    Attributes:
        run: the finished run.
        config: its ``config.yaml``.
        samples: its ``samples.parquet``: ``doc_id``, ``doc_hash`` and the metrics, a row for each item.
    """

    run: Run
    config: dict[str, Any]
    samples: pd.DataFrame

    @property
    def method(self) -> str:
        """Its name."""
        return self.run.method

    @property
    def task(self) -> str:
        """Its name."""
        return str(self.run.result["task"])

    @property
    def metric(self) -> str:
        """The one to show: ``acc_norm``, or ``acc`` for BoolQ, as in the paper."""
        return str(self.run.result["metric"])

    @property
    def value(self) -> float:
        """The score, as a fraction of one."""
        return float(self.run.result["metrics"][self.metric])

    @property
    def stderr(self) -> float | None:
        """Its standard error; none of a single item."""
        error = self.run.result["stderr"].get(self.metric)
        return None if error is None else float(error)

    @property
    def saved(self) -> float:
        """The share of the K,V cache's bytes that is saved."""
        savings = self.run.result["savings"]
        return 1 - float(savings["kv_bytes"]) / float(savings["kv_bytes_mha"])

    @property
    def saving(self) -> str:
        """``real``, ``simulated`` or ``none``."""
        return str(self.run.result["savings"]["kind"])

    @property
    def settings_id(self) -> str:
        """The same for runs that differ in their method alone."""
        return str(self.run.result["settings_id"])

    @property
    def settings(self) -> dict[str, Any]:
        """The method's hyper-parameters."""
        return {key: value for key, value in self.config["method"].items() if key != "name"}

    @property
    def conditions(self) -> dict[str, Any]:
        """What a whole table has in common: everything that was set but the method and the task."""
        config = self.config
        model = {f"model.{key}": value for key, value in config["model"].items() if key not in NO_SETTING}
        own = {key: config.get(key) for key in ("limit", "seed", "batch_size")}
        return own | {"task.num_fewshot": config["task"].get("num_fewshot", 0)} | model

    @property
    def conditions_id(self) -> str:
        """The same for runs under the same conditions."""
        return json.dumps(self.conditions, sort_keys=True, default=str)


def load_scores(results: Results) -> list[Score]:
    """All finished accuracy runs that can be used; the others go to ``results.left_out``."""
    found = []
    for run in results.runs(EXPERIMENT, fields=FIELDS):
        try:
            found.append(_load(run))
        except LeftOut as reason:
            results.left_out[run.folder] = str(reason)
    return found


def _load(run: Run) -> Score:
    config = read_config(run.folder)
    samples = _samples(run.folder / "samples.parquet", str(run.result["metric"]))
    score = Score(run, config, samples)
    try:
        value, share, _, _ = score.value, score.saved, score.stderr, score.saving
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        raise LeftOut("result.json lacks a score or savings that are numbers") from None
    if not 0 <= value <= 1 or share > 1:
        raise LeftOut(f"result.json is impossible: a score of {value}, {share:.3g} of the K,V bytes saved")
    if len(samples) != run.result["n"] or abs(samples[score.metric].mean() - value) > 1e-6:
        raise LeftOut("samples.parquet doesn't give the score in result.json")
    return score


def read_config(folder: Path) -> dict[str, Any]:
    """A run's ``config.yaml``.

    Raises:
        LeftOut: it is missing or lacks a section.
    """
    path = folder / "config.yaml"
    try:
        value = yaml.load(path.read_text(), Loader)
    except FileNotFoundError:
        raise LeftOut(f"no {path.name}") from None
    except (OSError, ValueError, yaml.YAMLError):
        value = None
    sections = ("method", "model", "task")
    if not isinstance(value, dict) or not all(isinstance(value.get(name), dict) for name in sections):
        raise LeftOut(f"{path.name} is corrupt")
    return value


def _samples(path: Path, metric: str) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise LeftOut(f"no {path.name}") from None
    except (OSError, ValueError, pa.ArrowException):
        raise LeftOut(f"{path.name} is corrupt") from None
    lacking = [name for name in ("doc_id", "doc_hash", metric) if name not in table]
    if lacking:
        raise LeftOut(f"{path.name} has no {', '.join(lacking)}")
    return table[[name for name in ("doc_id", "doc_hash", "acc", "acc_norm") if name in table]]
