"""Finished accuracy runs with their settings and each item's outcome."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.results.files import SkippedRun, read_json, read_table, read_yaml
from analysis.results.runs import Results, Run, RunQuery

ACCURACY = RunQuery(
    "accuracy",
    fields=("task", "metric", "metrics", "stderr", "n", "savings", "settings_id"),
    command="python run.py -m paper=figure1",
    small_command="python run.py -m paper=micro model=tiny",
)
#: Keys of the model's section that do not affect results, follow from its name and fingerprint, or are the method's.
NO_SETTING = ("path", "gguf", "package", "given", "device_map", "architecture", "resources", "predictor", "profile")
#: Keys of a run's configuration that do not affect results: where it ran, and where its files were.
MACHINE_ONLY = (
    "device", "results_dir", "force", "logger", "model.device_map", "model.resources", "model.path", "model.gguf",
    "model.package", "model.given", "model.predictor", "model.profile", "task.data_dir", "task.include_path",
    "task.fewshot_file", "task.text",
)  # fmt: skip
PREDICTOR_RECORD = "predictor.json"  # what a trained predictor's folder says about its training


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
        """Configuration without the method and the task: common to all runs of a table.

        The seed is one of them only where multi-head attention depends on it (:attr:`seed_matters`).
        """
        config = self.config
        keys = ("limit", "seed", "batch_size") if self.seed_matters else ("limit", "batch_size")
        general = {key: config.get(key) for key in keys}
        model = {f"model.{key}": value for key, value in config["model"].items() if key not in NO_SETTING}
        return general | {"task.num_fewshot": config["task"].get("num_fewshot", 0)} | model

    @property
    def seed_matters(self) -> bool:
        """Whether the seed changes the items' prompts (examples are drawn for them) or the weights."""
        return bool(self.config["task"].get("num_fewshot")) or bool(self.config["model"].get("random_init"))

    @cached_property
    def pairs_with(self) -> tuple[str, str]:
        """What two runs must have in common to be compared, in either part: the settings_id; the same without seed."""
        kept = {key: value for key, value in self.config.items() if key not in ("method", *MACHINE_ONLY)}
        for key in MACHINE_ONLY:
            section, _, name = key.rpartition(".")
            if section:
                kept[section] = {other: value for other, value in kept[section].items() if other != name}
        if not self.seed_matters:
            kept.pop("seed", None)
        return self.settings_id, json.dumps(kept, sort_keys=True, default=str)

    def is_pair(self, other: Score) -> bool:
        """Return whether two runs differ in their method alone, or in a seed that does not matter too."""
        return any(own == others for own, others in zip(self.pairs_with, other.pairs_with, strict=True))

    @cached_property
    def replicate(self) -> tuple[int, dict[str, Any]]:
        """The seed of what is random in the method, and the other settings: replicates differ in the seed alone.

        The seed of DejaVu is that of its predictors' training; the record of the training stands for their folder.
        """
        settings = {key: value for key, value in self.settings.items() if key != "seed"}
        seed = self.settings.get("seed", 0)
        if record := self._training():
            settings["predictor"], seed = {"recipe": record.get("recipe")}, record["seed"]
        return (seed if isinstance(seed, int) else 0), settings

    @property
    def has_chance(self) -> bool:
        """Whether another seed gives another outcome: random clusters, and predictors that are trained."""
        return self.method == "random" or (self.method == "dejavu" and self.settings.get("predictor") != "oracle")

    def _training(self) -> dict[str, Any]:
        """Return the record of the predictors' training; empty if the method has none, or their folder is elsewhere."""
        folder = self.settings.get("predictor")
        if not isinstance(folder, str) or not Path(folder, PREDICTOR_RECORD).is_file():
            return {}
        try:
            record = read_json(Path(folder, PREDICTOR_RECORD))
        except SkippedRun:
            return {}
        return record if isinstance(record.get("seed"), int) else {}

    @property
    def heads_kept(self) -> tuple[int, ...]:
        """Number of heads whose scores are computed, in each layer; empty if it is not recorded."""
        kept = self.run.result["savings"].get("heads_kept")
        return tuple(kept) if isinstance(kept, list) else ()

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
    if run.method == "spatten" and "pruning" not in settings:
        # Earlier versions pruned per row, and counted the operations of global pruning.
        settings = {"pruning": "per_row", **settings}
        run = replace(run, result={key: value for key, value in result.items() if key != "flops"})
    settings_id, task = str(result["settings_id"]), str(result["task"])
    return Score(run, config, samples, run.method, settings, settings_id, task, n, metric, value, stderr, saved, saving)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run's ``config.yaml``; raises :class:`SkippedRun` if it is missing, corrupt, or lacks a section."""
    return read_yaml(folder / "config.yaml", ("method", "model", "task"))
