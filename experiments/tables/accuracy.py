"""The table of accuracies, read back from the results on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.runs.files import read_json
from experiments.runs.state import is_done
from experiments.system.console import console
from experiments.tables.layout import make_table, print_table

Result = dict[str, Any]

#: Metrics of lm-eval that are fractions, hence are shown in %, besides those named ``acc_...`` and ``..._acc``. Some
#: tasks have the same names on a scale of 0 to 100 (the f1 of squadv2): only values up to 1 count as fractions.
FRACTIONS = frozenset(("acc", "exact_match", "quasi_exact_match", "em", "f1", "mcc", "contains", "pass@1"))

LEGEND = (
    "Change: points against the MHA run of the same settings. KV saved: of the cache's live bytes; real: less is\n"
    "stored and computed, simulated: masked only. Heads: heads whose scores are computed, mean of the layers."
)


def find_baseline(result: Result, results_dir: Path) -> Result | None:
    """Return the result of the complete MHA run that differs in the method alone."""
    if result["method"] == "mha":
        return result
    folder = results_dir / result["experiment"] / result["model"] / "mha" / result["task"]
    for path in sorted(folder.glob("*/result.json")):
        other = read_json(path)
        if other and is_done(path.parent) and other.get("settings_id") == result["settings_id"]:
            return other
    return None


def show_results(
    folders: list[Path], results_dir: Path, summarize: Callable[[list[Result]], Result | None] | None = None
) -> None:
    """Print a table of these runs, each below its MHA baseline where there is one.

    ``summarize`` turns the results of a group's tasks, of one method, into a last row.
    """
    rows: list[tuple[Result, Result | None]] = []
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
    if summarize is not None and rows and not missing:
        rows += summary_rows(rows, summarize)
    if rows:
        print_table(results_table(rows), LEGEND)
    for folder in missing:
        status = read_json(folder / "status.json") or {}
        console.print(f"no result: {folder} ({status.get('error', status.get('state', 'not started'))})", markup=False)


def summary_rows(
    rows: list[tuple[Result, Result | None]], summarize: Callable[[list[Result]], Result | None]
) -> list[tuple[Result, Result | None]]:
    """Return the row of the group under MHA, where all its tasks have that, and under the method."""
    tasks = {result["task"] for result, _ in rows}
    found: dict[str, Result] = {}
    for method in dict.fromkeys(result["method"] for result, _ in rows):
        members = [result for result, _ in rows if result["method"] == method]
        if len(members) == len(tasks) and (summary := summarize(members)):
            found[method] = summary
    return [(summary, found.get("mha")) for summary in found.values()]


def results_table(rows: list[tuple[Result, Result | None]]) -> Table:
    """Return accuracy, its change, and what is saved, a row for each result; a rule between tasks."""
    metrics: dict[str, dict[str, None]] = {}
    for result, _ in rows:
        metrics.setdefault(result["metric"], {})[result["task"]] = None
    caption = "; ".join(f"{metric}: {', '.join(tasks)}" for metric, tasks in metrics.items())
    if len(metrics) == 1:
        caption = rows[0][0]["metric"]
    caption = "; ".join([caption, *dict.fromkeys(text for result, _ in rows for text in predictor_recall(result))])
    in_percent, model = fractions([result for result, _ in rows]), rows[0][0]["model"]
    table = make_table(
        f"Accuracy of {model}, % ± standard error"
        if all((result["task"], result["metric"]) in in_percent for result, _ in rows)
        else f"Scores of {model}; fractions in %",
        ["Task", "Method"],
        ["Score", "Change", "KV saved", "Heads", "n", "Seconds"],
        caption=caption,
        caption_justify="left",
    )
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for index, (result, baseline) in enumerate(rows):
        is_last = index + 1 == len(rows) or rows[index + 1][0]["task"] != result["task"]
        keys = shown_metrics(result)
        for key in keys:
            percent = (result["task"], key) in in_percent
            cells = result_cells(result, baseline, key, percent=percent, name_filter=len(keys) > 1)
            table.add_row(*cells, end_section=is_last and key == keys[-1])
    return table


def fractions(results: list[Result]) -> set[tuple[str, str]]:
    """Return the tasks and metrics whose scores are shown in %: known fractions, under every method at most 1."""
    scores: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for key in shown_metrics(result):
            scores.setdefault((result["task"], key), []).append(result["metrics"][key])
    return {
        (task, key)
        for (task, key), values in scores.items()
        if is_fraction(key.partition(",")[0]) and not any(abs(value) > 1 for value in values)
    }


def is_fraction(metric: str) -> bool:
    """Return whether a metric of that name is a fraction in most tasks."""
    return metric in FRACTIONS or metric.startswith("acc_") or metric.endswith("_acc")


def predictor_recall(result: Result) -> list[str]:
    """Return the recall of a run's predictors on held-out tokens as text; empty for a run without predictors."""
    return [
        f"{result['method']}, recall of {part} at {100 * found['sparsity']:g} %: {found['recall']:.2f}"
        for part, found in result.get("predictor", {}).items()
        if found is not None and found["recall"] is not None
    ]


def shown_metrics(result: Result) -> list[str]:
    """Return the keys of the result's metric under each filter, its own first: ``exact_match,strict-match``."""
    own = result["metric"]
    same = [key for key in result["metrics"] if key.partition(",")[0] == own.partition(",")[0] and key != own]
    return [own, *same]


def result_cells(
    result: Result, baseline: Result | None, metric: str, *, percent: bool, name_filter: bool = False
) -> list[str]:
    """Return one row of the table as text."""
    savings, heads = result["savings"], result["savings"]["heads_kept"]
    score, error = result["metrics"][metric], result["stderr"].get(metric)
    label = metric.partition(",")[2]
    scale, digits = (100, 1) if percent else (1, 3)
    change = ""
    if result["method"] != "mha":
        change = f"{scale * (score - baseline['metrics'][metric]):+.{digits}f}" if baseline else "no MHA run"
    return [
        f"{result['task']} ({label})" if name_filter and label else result["task"],
        result["method"],
        f"{scale * score:.{digits}f}" + (f" ± {scale * error:.{digits}f}" if isinstance(error, (int, float)) else ""),
        change,
        f"{100 * (1 - savings['kv_bytes'] / savings['kv_bytes_mha']):.1f} % {savings['kind']}",
        f"{sum(heads) / len(heads):.1f}",
        str(result["n"]),
        f"{result['seconds']:.1f}",
    ]
