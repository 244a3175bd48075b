"""The table of a passkey task's accuracy by length, all methods beside each other, from the results on disk."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.runs.files import read_json
from experiments.runs.state import is_done
from experiments.tables.accuracy import Result
from experiments.tables.layout import make_table, print_table

LEGEND = (
    "Share of items, all depths together, whose key is found exactly; every run with the same settings but for the\n"
    "method. Heads: heads whose scores are computed, mean of the layers. KV saved: of the cache's live bytes."
)


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


def comparable_runs(result: Result, results_dir: Path) -> list[tuple[Result, pd.Series]]:
    """Return the finished runs that differ from one in the method alone, with their scores; MHA's first."""
    runs = []
    for path in sorted(results_dir.glob(f"{result['experiment']}/{result['model']}/*/{result['task']}/*/result.json")):
        other = read_json(path)
        if other is None or not is_done(path.parent) or other.get("settings_id") != result["settings_id"]:
            continue
        if (scores := scores_by_length(path.parent, other)) is not None:
            runs.append((other, scores))
    return sorted(runs, key=lambda run: (run[0]["method"] != "mha", run[0]["method"], -mean_heads(run[0])))


def scores_by_length(folder: Path, result: Result) -> pd.Series | None:
    """Return a run's mean score for each length; ``None`` where its items have none."""
    try:
        samples = pd.read_parquet(folder / "samples.parquet", columns=["length", result["metric"]])
    except (OSError, ValueError, KeyError):
        return None
    return samples.groupby("length")[result["metric"]].mean()


def mean_heads(result: Result) -> float:
    """Return the heads whose scores are computed, mean of the layers."""
    heads = result["savings"]["heads_kept"]
    return sum(heads) / len(heads)


def print_lengths(runs: list[tuple[Result, pd.Series]]) -> None:
    """Print one table: a row for each run, a column for each length in tokens."""
    if not runs:
        return
    first, _ = runs[0]
    lengths = sorted({length for _, scores in runs for length in scores.index})
    table = make_table(
        f"{first['task']} on {first['model']}: keys found, %",
        ["Method"],
        [*(f"{length:,}" for length in lengths), "All", "Heads", "KV saved", "n"],
    )
    for result, scores in runs:
        savings = result["savings"]
        table.add_row(
            result["method"],
            *(f"{100 * scores[length]:.0f}" if length in scores.index else "" for length in lengths),
            f"{100 * result['metrics'][result['metric']]:.1f}",
            f"{mean_heads(result):.1f}",
            f"{100 * (1 - savings['kv_bytes'] / savings['kv_bytes_mha']):.1f} %",
            str(result["n"]),
        )
    print_table(table, LEGEND)
