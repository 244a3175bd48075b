"""Tables for the page: those of the paper, filled, and those of other models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.plotting.style import label
from analysis.results.files import SkippedRun, read_file
from analysis.results.scores import Score
from analysis.stats import VERDICTS, Verdict
from analysis.tables.cells import Cell, Table, build
from analysis.tables.layout import error_text, interval_text, value_text
from analysis.tables.specs import PAPER, TABLES, TASKS, Spec, paper_rows


def fill(scores: Sequence[Score], problems: dict[Path, str]) -> dict[str, Table]:
    """Fill all tables of :data:`TABLES`; if the paper's numbers are corrupt, show ours alone, add to ``problems``."""
    tables = {}
    for name, spec in TABLES.items():
        path = PAPER / f"{name}.csv"
        try:
            paper = read_file(path, lambda path: paper_rows(path.stem))
        except SkippedRun as reason:
            problems[path] = str(reason)
            paper = []
        tables[name] = build(spec, spec.model, scores, paper)
    return tables


def others(scores: Sequence[Score], excluded: Sequence[str]) -> list[Table]:
    """Return tables of the models that have runs of the paper's tasks, except the excluded ones."""
    tasks_of: dict[str, set[str]] = {}
    for score in scores:
        if score.run.model not in excluded and score.task in TASKS:
            tasks_of.setdefault(score.run.model, set()).add(score.task)
    tables = []
    for model, tasks in sorted(tasks_of.items()):
        columns = tuple(task for task in TASKS if task in tasks)
        title = f"Accuracy on {label(model)}"
        spec = Spec(f"other-{model}", title, model, columns, None, mean=len(columns) > 1)
        tables.append(build(spec, model, scores, []))
    return tables


def verdict_counts(table: Table, passed: Mapping[Path, str]) -> dict[Verdict, int]:
    """Count the cells of each verdict, if the paper has numbers; runs in ``passed`` have none."""
    cells = [cell for row in table.rows for cell in row.cells if cell.verdict and not uncounted(cell, passed)]
    counts = Counter(cell.verdict for cell in cells)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def uncounted(cell: Cell, passed: Mapping[Path, str]) -> str:
    """Return why the runs of a cell do not count for what the paper says, given such runs with the reason; or empty."""
    return next((passed[score.run.folder] for score in cell.scores if score.run.folder in passed), "")


def cell_words(cell: Cell) -> str:
    """Return our number; or why there is none."""
    words = {"missing": "not run yet", "no MHA": "no MHA run", "refused": f"refused: {cell.reason}"}
    return value_text(cell) if cell.state == "done" else words[cell.state]


def cell_ends(cell: Cell) -> str:
    """Return the interval of a change or the standard error of a score; empty without either."""
    return interval_text(cell) or error_text(cell)


def cell_title(cell: Cell) -> str:
    """Return the runs that a cell is computed from."""
    runs = dict.fromkeys(score.run for score in cell.scores)
    return "; ".join(f"run {run.result['run_id']} ({run.method})" for run in runs)
