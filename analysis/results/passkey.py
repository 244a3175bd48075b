"""Finished runs of passkey tasks: the share of keys found, by length of the prompt and depth of the key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.results.files import SkippedRun, read_table
from analysis.results.runs import MissingRun, Results, Run, RunQuery
from analysis.results.scores import read_config

PASSKEY = RunQuery(
    "accuracy",
    fields=("task", "metric", "metrics", "n", "savings", "settings_id"),
    command="python run.py -m experiment=accuracy model=smollm2_135m method=mha,chai task=passkey",
    small_command="python run.py -m model=tiny method=mha,chai task=passkey task.lengths='[96,160]'",
)


@dataclass(frozen=True, eq=False)
class PasskeyRun:
    """A run with its cells."""

    run: Run
    settings: dict[str, Any]  # of the method
    cells: pd.DataFrame  # length, depth, n (items), score (between 0 and 1); a row for each cell
    heads: tuple[int, ...]  # whose scores are computed, in each layer
    saved: float  # share of the KV cache's bytes

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.run.result["task"])

    @property
    def score(self) -> float:
        """Share of all items whose key is found."""
        return float((self.cells.score * self.cells.n).sum() / self.cells.n.sum())

    @property
    def numbers(self) -> list[float]:
        """Numbers among the settings, to order runs of a method by."""
        return [float(value) for value in self.settings.values() if isinstance(value, (int, float))]

    def differing(self, runs: Sequence[PasskeyRun]) -> list[str]:
        """Return what the method's other runs have set differently, as ``tokens=64``; clusters are in the heads."""
        same = [one.settings for one in runs if (one.run.method, one.task) == (self.run.method, self.task)]
        return [
            f"{key}={value}"
            for key, value in self.settings.items()
            if key != "clusters" and any(settings.get(key) != value for settings in same)
        ]

    def by_length(self) -> pd.Series:
        """Return the score for each length, all depths together."""
        found = (self.cells.score * self.cells.n).groupby(self.cells.length).sum()
        return found / self.cells.n.groupby(self.cells.length).sum()


def passkey_runs(results: Results) -> list[PasskeyRun]:
    """Return the runs of one model, comparable for each of its tasks: multi-head attention first, then by heads.

    The model is the one with the most runs; of a task with several settings, those with the most runs, or the newest.

    Raises:
        MissingRun: There is no such run.
    """
    runs = results.runs(PASSKEY)
    loaded = [results.attempt(run.folder, _load, run) for run in runs]
    found = [one for one in loaded if one is not None]
    if not found:
        if not runs:
            raise results.missing(PASSKEY)
        message = f"no finished run of a passkey task in {results.root}"
        raise MissingRun(message, PASSKEY.command, model=results.model)
    models = [one.run.model for one in found]
    model = max(models, key=models.count)
    groups: dict[str, dict[str, list[PasskeyRun]]] = {}  # task -> settings_id -> runs
    for one in found:
        if one.run.model == model:
            groups.setdefault(one.task, {}).setdefault(one.run.result["settings_id"], []).append(one)
    chosen = []
    for task in sorted(groups):
        group = max(groups[task].values(), key=lambda runs: (len(runs), max(one.run.updated for one in runs)))
        chosen += sorted(group, key=lambda one: (one.run.method != "mha", one.run.method, -sum(one.heads), one.numbers))
    results.used += [one.run for one in chosen]
    return chosen


def _load(run: Run) -> PasskeyRun | None:
    """Return a run's cells; ``None`` for another task."""
    config = read_config(run.folder)
    if config["task"].get("key") is None:
        return None
    metric = str(run.result["metric"])
    samples = read_table(run.folder / "samples.parquet", ("length", "depth", metric))
    grouped = samples.groupby(["length", "depth"])[metric]
    cells = pd.DataFrame({"n": grouped.size(), "score": grouped.mean()}).reset_index()
    try:
        savings = run.result["savings"]
        saved = 1 - savings["kv_bytes"] / savings["kv_bytes_mha"]
        found = PasskeyRun(run, config["method"], cells, tuple(savings["heads_kept"]), saved)
        value = float(run.result["metrics"][metric])
    except (KeyError, TypeError, ZeroDivisionError):
        raise SkippedRun("result.json has no numeric score or savings") from None
    if len(samples) != run.result["n"] or abs(found.score - value) > 1e-6:
        raise SkippedRun("samples.parquet does not match the score in result.json")
    return found
