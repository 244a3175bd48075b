"""The table at the end of a run, read back from the results on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.runs.files import read_json
from experiments.system.console import console

LEGEND = (
    "Change: points against the MHA run of the same settings. K,V saved: of the cache's live bytes; real: less is\n"
    "stored and computed, simulated: masked only. Heads: heads whose scores are computed, mean of the layers."
)


def find_baseline(result: dict[str, Any], results_dir: Path) -> dict[str, Any] | None:
    """The done MHA run that differs from this one in its method alone."""
    if result["method"] == "mha":
        return result
    folder = results_dir / result["experiment"] / result["model"] / "mha" / result["task"]
    for path in sorted(folder.glob("*/result.json")):
        status = read_json(path.with_name("status.json")) or {}
        other = read_json(path)
        if other and status.get("state") == "done" and other.get("settings_id") == result["settings_id"]:
            return other
    return None


def show_results(folders: list[Path], results_dir: Path) -> None:
    """Print a table of these runs, each under its MHA baseline where there is one."""
    rows: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    missing = []
    for folder in folders:
        result = read_json(folder / "result.json")
        if result is None:
            missing.append(folder)
            continue
        baseline = find_baseline(result, results_dir)
        if baseline is not None and baseline is not result:
            rows.append((baseline, baseline))
        rows.append((result, baseline))
    if rows:
        console.print(results_table(rows))
        console.print(LEGEND, style="dim", highlight=False)
    for folder in missing:
        status = read_json(folder / "status.json") or {}
        console.print(f"no result: {folder} ({status.get('error', status.get('state', 'not started'))})", markup=False)


def results_table(rows: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> Table:
    """Accuracy, its change, and what is saved, a row for each result; a rule between tasks."""
    metrics: dict[str, list[str]] = {}
    for result, _ in rows:
        names = metrics.setdefault(result["metric"], [])
        if result["task"] not in names:
            names.append(result["task"])
    shown = "; ".join(
        f"{metric}: {', '.join(names)}" if len(metrics) > 1 else metric for metric, names in metrics.items()
    )
    table = Table(
        title=f"Accuracy of {rows[0][0]['model']}, % ± standard error",
        title_justify="left",
        box=SIMPLE_HEAD,
        caption=shown,
        caption_justify="left",
        padding=(0, 1),
    )
    table.add_column("Task", overflow="fold")
    table.add_column("Method", no_wrap=True)
    for column in ("Score", "Change", "K,V saved", "Heads", "n", "Seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, (result, baseline) in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1][0]["task"] != result["task"]
        table.add_row(*result_cells(result, baseline), end_section=last)
    return table


def result_cells(result: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    """One row of the table as text."""
    metric, savings, kept = result["metric"], result["savings"], result["savings"]["heads_kept"]
    score, error = result["metrics"][metric], result["stderr"].get(metric)
    change = ""
    if result["method"] != "mha":
        change = f"{100 * (score - baseline['metrics'][metric]):+.1f}" if baseline else "no MHA run"
    saved = f"{100 * (1 - savings['kv_bytes'] / savings['kv_bytes_mha']):.1f} % {savings['kind']}"
    return [
        result["task"],
        result["method"],
        f"{100 * score:.1f}" + (f" ± {100 * error:.1f}" if isinstance(error, (int, float)) else ""),
        change,
        saved,
        f"{sum(kept) / len(kept):.1f}",
        str(result["n"]),
        f"{result['seconds']:.1f}",
    ]
