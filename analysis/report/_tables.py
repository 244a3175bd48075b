"""Tables for the page: the paper's, filled, and those of other models; each cell with its verdict and provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from analysis.figures import _look
from analysis.report._figures import uri
from analysis.report._verdict import CELL_TOLERANCE, VERDICTS, Interval, Verdict, judge
from analysis.saved import LeftOut
from analysis.scores import Score
from analysis.tables._cells import Cell, Row, Table, build
from analysis.tables._formats import comma_separated
from analysis.tables._layout import cell_text, commands, interval_text, notes, paper_text
from analysis.tables._specs import PAPER, TABLES, TASKS, PaperRow, Spec, paper_rows, task_name

Z95 = 1.959964  # standard errors of a 95 % interval


@dataclass(frozen=True)
class Shown:
    """A cell as text.

    Attributes:
        ours: our number; a word where there is none.
        interval: its ends; empty: none.
        paper: the paper's number; empty: none.
        verdict: empty where the paper has no number.
        order: what the column is sorted by; ``None``: goes last.
        title: the runs.
        state: of the cell.
    """

    ours: str
    interval: str
    paper: str
    verdict: str
    order: float | None
    title: str
    state: str


@dataclass(frozen=True)
class Sheet:
    """A table on the page.

    Attributes:
        name: names it; unique.
        title: its heading.
        model: whose runs.
        columns: their names.
        rows: label, cells, kind of saving, share saved in %.
        notes: how to read it.
        commands: for each row with a cell missing, its label and what fills it.
        counts: cells by verdict, where the paper has numbers.
        data: data URI of its CSV; empty: no rows.
    """

    name: str
    title: str
    model: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Shown], str, float | None]]
    notes: Sequence[str]
    commands: Sequence[tuple[str, str]]
    counts: dict[Verdict, int]
    data: str


def paper_numbers(name: str) -> list[PaperRow]:
    """The paper's rows of a table.

    Raises:
        LeftOut: the file is corrupt.
    """
    try:
        return paper_rows(name)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, InvalidOperation):
        raise LeftOut(f"{name}.csv is corrupt") from None


def fill(scores: Sequence[Score], problems: dict[str, str]) -> dict[str, Table]:
    """All tables with the paper's numbers, by name; one whose numbers are corrupt shows ours alone.

    Args:
        scores: all runs.
        problems: files that don't count, and why; added to.
    """
    tables = {}
    for name, spec in TABLES.items():
        try:
            paper = paper_numbers(name)
        except LeftOut as reason:
            problems[str(PAPER / f"{name}.csv")] = str(reason)
            paper = []
        tables[name] = build(name, spec, spec.model, scores, paper)
    return tables


def others(scores: Sequence[Score], shown: Sequence[str]) -> list[Table]:
    """Tables of the models that have runs of the paper's tasks but no table of their own.

    Args:
        scores: all runs.
        shown: models that have one.
    """
    found: dict[str, set[str]] = {}
    for score in scores:
        if score.run.model not in shown and score.task in TASKS:
            found.setdefault(score.run.model, set()).add(score.task)
    tables = []
    for model, tasks in sorted(found.items()):
        columns = tuple(task for task in TASKS if task in tasks)
        spec = Spec(f"Accuracy on {_look.label(model)}", model, columns, None, mean=len(columns) > 1)
        tables.append(build(f"other-{model}", spec, model, scores, []))
    return tables


def sheet(table: Table) -> Sheet:
    """A table as text."""
    rows = [(row.label, [_shown(table, row, cell) for cell in row.cells], row.saving, row.saved) for row in table.rows]
    counts = Counter(cell.verdict for _, cells, _, _ in rows for cell in cells if cell.verdict)
    return Sheet(
        table.name, table.spec.title, table.model, [task_name(column) for column in table.columns],
        [(label, cells, saving, None if saved is None else 100 * saved) for label, cells, saving, saved in rows],
        notes(table), commands(table), {verdict: counts.get(verdict, 0) for verdict in VERDICTS},
        uri("text/csv", comma_separated(table).encode()) if table.rows else "",
    )  # fmt: skip


def interval(cell: Cell) -> Interval | None:
    """Our number, in % or points, with the ends of its 95 % interval."""
    if cell.points is None:
        return None
    if cell.change is not None:
        return Interval(cell.points, 100 * cell.change.low, 100 * cell.change.high)
    half = Z95 * 100 * (cell.stderr or 0)
    return Interval(cell.points, cell.points - half, cell.points + half)


def _verdict(cell: Cell, paper: Decimal | None) -> str:
    return "" if paper is None else judge(interval(cell), "equals", float(paper), CELL_TOLERANCE)


def _shown(table: Table, row: Row, cell: Cell) -> Shown:
    runs = [score.run for score in (cell.score, cell.baseline) if score]
    title = "; ".join(f"run {run.result['run_id']} ({run.method})" for run in dict.fromkeys(runs))
    words = {"missing": "not run yet", "no MHA": "no MHA run", "refused": f"refused: {cell.reason}"}
    ours = cell_text(cell) if cell.state == "done" else words[cell.state]
    ends = interval_text(cell) if cell.state == "done" else ""
    if cell.change is None and cell.state == "done":  # a score: ± is in its text
        ours, _, error = ours.partition(" ± ")
        ends = f"± {error}" if error else ""
    return Shown(ours, ends, paper_text(row, cell), _verdict(cell, cell.paper), cell.points, title, cell.state)
