"""The table of a passkey task's accuracy by length, all methods beside each other, from the results on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from experiments.runs.files import read_json
from experiments.runs.state import is_done
from experiments.tables.accuracy import Result
from experiments.tables.layout import make_table, print_table

LEGEND = (
    "Share of items, all depths together, whose key is found exactly; every run with the same settings but for the\n"
    "method. Heads: heads whose scores are computed, mean of the layers. KV saved: of the cache's live bytes."
)


@dataclass(eq=False)
class PasskeyRun:
    """A finished run of a passkey task."""

    result: Result
    scores: pd.Series  # by length
    settings: dict[str, Any]  # of the method

    @property
    def heads(self) -> float:
        """Heads whose scores are computed, mean of the layers."""
        kept = self.result["savings"]["heads_kept"]
        return sum(kept) / len(kept)

    @property
    def numbers(self) -> list[float]:
        """Numbers among the settings, to order runs of a method by."""
        return [float(value) for value in self.settings.values() if isinstance(value, (int, float))]

    def name(self, runs: Sequence[PasskeyRun]) -> str:
        """Return the method, with what its other runs have set differently; the cluster counts are in the heads."""
        same = [run.settings for run in runs if run.result["method"] == self.result["method"]]
        keys = [
            key
            for key in self.settings
            if key != "clusters" and any(one.get(key) != self.settings[key] for one in same)
        ]
        return " ".join([self.result["method"], *(f"{key}={self.settings[key]}" for key in keys)])


def show_lengths(folders: list[Path], results_dir: Path) -> None:
    """Print a table for each of these runs' passkey tasks; runs of other tasks have none."""
    shown = set()
    for folder in folders:
        result = read_json(folder / "result.json")
        if result is None or "settings_id" not in result or result["settings_id"] in shown:
            continue
        if scores_by_length(folder, result) is None:
            continue
        shown.add(result["settings_id"])
        print_lengths(comparable_runs(result, results_dir))


def comparable_runs(result: Result, results_dir: Path) -> list[PasskeyRun]:
    """Return the finished runs that differ from one in the method alone, MHA's first."""
    runs = []
    for path in sorted(results_dir.glob(f"{result['experiment']}/{result['model']}/*/{result['task']}/*/result.json")):
        other = read_json(path)
        if other is None or not is_done(path.parent) or other.get("settings_id") != result["settings_id"]:
            continue
        if (scores := scores_by_length(path.parent, other)) is not None:
            config: Any = OmegaConf.to_container(OmegaConf.load(path.with_name("config.yaml")))
            runs.append(PasskeyRun(other, scores, config["method"]))
    return sorted(runs, key=lambda run: (run.result["method"] != "mha", run.result["method"], -run.heads, run.numbers))


def scores_by_length(folder: Path, result: Result) -> pd.Series | None:
    """Return a run's mean score for each length; ``None`` where its items have none."""
    try:
        samples = pd.read_parquet(folder / "samples.parquet", columns=["length", result["metric"]])
    except (OSError, ValueError, KeyError):
        return None
    return samples.groupby("length")[result["metric"]].mean()


def print_lengths(runs: list[PasskeyRun]) -> None:
    """Print one table: a row for each run, a column for each length in tokens."""
    if not runs:
        return
    first = runs[0].result
    lengths = sorted({length for run in runs for length in run.scores.index})
    table = make_table(
        f"{first['task']} on {first['model']}: keys found, %",
        ["Method"],
        [*(f"{length:,}" for length in lengths), "All", "Heads", "KV saved", "n"],
    )
    for run in runs:
        result, scores, savings = run.result, run.scores, run.result["savings"]
        table.add_row(
            run.name(runs),
            *(f"{100 * scores[length]:.0f}" if length in scores.index else "" for length in lengths),
            f"{100 * result['metrics'][result['metric']]:.1f}",
            f"{run.heads:.1f}",
            f"{100 * (1 - savings['kv_bytes'] / savings['kv_bytes_mha']):.1f} %",
            str(result["n"]),
        )
    print_table(table, LEGEND)
