"""Make text of a table: for each row our numbers, their intervals, the paper's numbers and the gaps; then notes."""

from __future__ import annotations

from itertools import zip_longest

from analysis.stats import LEVEL
from analysis.tables.cells import Cell, Row, Table
from analysis.tables.settings import assignments, command, sweep
from analysis.tables.specs import task_name

STARS = ((0.01, "**"), (0.05, "*"))


def header(table: Table) -> list[str]:
    """Return the names of the columns."""
    return ["Method", *_line_kind(table, ""), *map(task_name, table.spec.columns), "KV saved"]


def _line_kind(table: Table, name: str) -> list[str]:
    """Return the cell that names the kind of a line; none if the table has our numbers only."""
    return [name] if any(row.paper for row in table.rows) else []


def block(table: Table, row: Row) -> list[list[str]]:
    """Return the lines of one row, each as its cells: name, kind of line, tasks, saving."""
    lines = [[*_line_kind(table, "ours"), *map(cell_text, row.cells)]]
    if any(cell.change for cell in row.cells):
        lines.append([*_line_kind(table, f"{100 * LEVEL:g} %"), *map(interval_text, row.cells)])
    if row.paper is not None:
        lines.append(["paper", *(paper_text(row, cell) for cell in row.cells)])
        if any(cell.gap is not None for cell in row.cells):
            lines.append(["gap", *("" if cell.gap is None else signed(cell.gap) for cell in row.cells)])
    # The share saved goes on a line of its own if there is one.
    saving = [row.saving] if row.saved is None or row.saving == "none" else [row.saving, f"{100 * row.saved:.1f} %"]
    if len(lines) < len(saving):
        saving = [" ".join(saving)]
    ends = zip_longest([row.label], saving, lines, fillvalue="")
    return [[name, *line, share] for name, share, line in ends]


def signed(points: float) -> str:
    """Format with one decimal and a sign; no sign for what rounds to zero."""
    text = f"{points:+.1f}"
    return "0.0" if float(text) == 0 else text


def value_text(cell: Cell) -> str:
    """Format our number, a change with stars for its significance; without one, the state."""
    if cell.points is None:
        return cell.state
    if cell.change is None:
        return f"{cell.points:.1f}"
    return signed(cell.points) + next((mark for limit, mark in STARS if cell.change.p < limit), "")


def error_text(cell: Cell) -> str:
    """Format the standard error of a score; empty for a change."""
    return "" if cell.stderr is None else f"± {100 * cell.stderr:.1f}"


def cell_text(cell: Cell) -> str:
    """Format our number with its standard error, if it has one."""
    return " ".join(filter(None, (value_text(cell), error_text(cell))))


def interval_text(cell: Cell) -> str:
    """Format the 95 % interval of a change, in points; empty for a score."""
    if cell.change is None:
        return ""
    if cell.change.lost + cell.change.gained == 0:
        return "no flips"  # an interval of no width would claim too much
    return f"{signed(cell.change.points.low)}…{signed(cell.change.points.high)}"


def paper_text(row: Row, cell: Cell) -> str:
    """Format the paper's number with the digits that it has there."""
    if cell.paper is None:
        return ""
    return f"{cell.paper}" if row.method == "mha" or not cell.paper else f"{cell.paper:+}"


def notes(table: Table) -> list[str]:
    """Return notes on how to read the table, its conditions, and what it does not show."""
    lines = []
    if table.like is not None:
        lines.append(
            f"MHA: % ± standard error. Others: points against MHA on the same items, below them the {100 * LEVEL:g} % "
            "interval by paired bootstrap; * p < 0.05, ** p < 0.01 (McNemar, exact, each cell by itself)."
        )
        if table.spec.mean:
            lines.append("Mean: each task counts the same; its p is computed from the flips of all items.")
    if any(row.paper for row in table.rows):
        lines.append("paper: its numbers" + ("; gap: ours minus the paper's." if table.like else "."))
    if table.like is not None:
        lines.append(
            "KV saved: share of the cache's live bytes, mean of the tasks; real: less is stored and computed, "
            "simulated: masked only."
        )
        lines.append(_conditions(table))
    for row in table.rows:
        if row.settings and "(" in row.label:
            lines.append(f"{row.label}: {', '.join(assignments(row.settings))}.")
    if table.others:
        lines.append(f"Not shown, because runs are compared under the same settings only: {'; '.join(table.others)}.")
    for row in table.rows:
        refused = [cell for cell in row.cells if cell.state == "refused"]
        lines += [f"Refused: {row.label} on {cell.task}: {cell.reason}." for cell in refused]
        if row.paper and row.paper.note:
            lines.append(f"Paper, {row.paper.source}, {row.paper.label}: {row.paper.note}.")
    return list(dict.fromkeys(lines))  # several rows of ours can stand beside one of the paper


def _conditions(table: Table) -> str:
    """Describe the conditions that all runs of the table share."""
    like = table.like
    assert like is not None
    baseline = next((row for row in table.rows if row.method == "mha"), None)
    counts = {task_name(score.task): score.n for score in (baseline.scores if baseline else [])}
    items = "items: " + ", ".join(f"{name} {n}" for name, n in counts.items()) if counts else ""
    if len(set(counts.values())) == 1:
        items = f"{next(iter(counts.values()))} items a task"
    limit = f"limit={like.config.get('limit')}" if like.config.get("limit") else "all items"
    seed, batch = like.config.get("seed"), like.config.get("batch_size")
    parts = [f"Ours: {table.model}", like.run.dtype, limit, items, f"seed={seed}", f"batch_size={batch}"]
    return ", ".join(filter(None, parts)) + "."


def commands(table: Table) -> list[tuple[str, str]]:
    """Return name and command for each row with a cell missing, after the command that fills all of them."""
    lines = []
    for row in table.rows:
        if tasks := row.tasks("missing"):
            line = command(table.spec, table.model, table.like, row.method, row.settings, tasks)
            lines.append((row.label, line))
    if lines:
        lines.insert(0, ("all", sweep(table.spec, table.model, table.like)))
    return lines
