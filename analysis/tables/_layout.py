"""A table as lines of text: each row is our number, its interval, the paper's number and the gap between the two."""

from __future__ import annotations

from itertools import zip_longest

from analysis.paired import LEVEL
from analysis.tables._cells import Cell, Row, Table
from analysis.tables._settings import command, sweep, text
from analysis.tables._specs import task_name

STARS = ((0.01, "**"), (0.05, "*"))


def header(table: Table) -> list[str]:
    """What the columns are."""
    return ["Method", *kind(table, ""), *map(task_name, table.columns), "K,V saved"]


def kind(table: Table, name: str) -> list[str]:
    """What a line is; without the paper's numbers beside ours, that needs no saying."""
    return [name] if any(row.paper for row in table.rows) else []


def block(table: Table, row: Row) -> list[list[str]]:
    """The lines of one row, each as its cells: name, what the line is, tasks, saving."""
    lines = [[*kind(table, "ours"), *(cell_text(cell) for cell in row.cells)]]
    if any(cell.change for cell in row.cells):
        lines.append([*kind(table, f"{100 * LEVEL:g} %"), *(interval_text(cell) for cell in row.cells)])
    if row.paper is not None:
        lines.append(["paper", *(paper_text(row, cell) for cell in row.cells)])
        if any(cell.gap is not None for cell in row.cells):
            lines.append(["gap", *("" if cell.gap is None else signed(cell.gap) for cell in row.cells)])
    saving = [row.saving] if row.saved is None or row.saving == "none" else [row.saving, f"{100 * row.saved:.1f} %"]
    if len(lines) < len(saving):
        saving = [" ".join(saving)]
    ends = zip_longest([row.label], saving, lines, fillvalue="")
    return [[name, *line, share] for name, share, line in ends]


def signed(points: float) -> str:
    """One decimal with its sign; what rounds to nothing has none."""
    shown = f"{points:+.1f}"
    return "0.0" if float(shown) == 0 else shown


def stars(cell: Cell) -> str:
    """The mark of significance."""
    if cell.change is None:
        return ""
    return next((mark for limit, mark in STARS if cell.change.p < limit), "")


def cell_text(cell: Cell) -> str:
    """Our number: a score with its standard error, a change with its mark, or why there is none."""
    if cell.points is None:
        return cell.state
    if cell.change is not None:
        return signed(cell.points) + stars(cell)
    return f"{cell.points:.1f}" + ("" if cell.stderr is None else f" ± {100 * cell.stderr:.1f}")


def interval_text(cell: Cell) -> str:
    """The 95 % interval of a change, in points."""
    if cell.change is None:
        return ""
    if cell.change.lost + cell.change.gained == 0:
        return "no flips"  # the interval would have no width, and promise too much
    return f"{signed(100 * cell.change.low)}…{signed(100 * cell.change.high)}"


def paper_text(row: Row, cell: Cell) -> str:
    """The paper's number with its digits."""
    if cell.paper is None:
        return ""
    return f"{cell.paper}" if row.method == "mha" or not cell.paper else f"{cell.paper:+}"


def notes(table: Table) -> list[str]:
    """How to read the table, where its numbers are from, and how to get those that aren't there."""
    found = []
    if table.like is not None:
        found.append(
            f"MHA: % ± standard error. Others: points against MHA on the same items, below them the {100 * LEVEL:g} % "
            "interval by paired bootstrap; * p < 0.05, ** p < 0.01 (McNemar, exact, each cell by itself)."
        )
        if table.spec.mean:
            found.append("Mean: each task counts the same; its p is that of all items' flips.")
    if any(row.paper for row in table.rows):
        found.append("paper: its numbers" + ("; gap: ours less the paper's." if table.like else "."))
    if table.like is not None:
        found.append(
            "K,V saved: share of the cache's live bytes, mean of the tasks; real: less is stored and computed, "
            "simulated: masked only."
        )
        found.append(_conditions(table))
    found += [f"{row.label}: {_said(row)}." for row in table.rows if row.settings and "(" in row.label]
    if table.others:
        found.append(f"Not shown, for runs are compared under the same settings only: {'; '.join(table.others)}.")
    for row in table.rows:
        found += [
            f"Refused: {row.label} on {cell.task}: {cell.reason}." for cell in row.cells if cell.state == "refused"
        ]
        if row.paper and row.paper.note:
            found.append(f"Paper, {row.paper.source}, {row.paper.label}: {row.paper.note}.")
    return list(dict.fromkeys(found))  # several rows of ours can stand beside one of the paper


def _said(row: Row) -> str:
    return ", ".join(f"{key}={text(value)}" for key, value in row.settings.items())


def _conditions(table: Table) -> str:
    """What was run, in words."""
    like = table.like
    assert like is not None
    baseline = next((row for row in table.rows if row.method == "mha"), None)
    scores = [cell.score for cell in baseline.cells if cell.score] if baseline else []
    counts = {task_name(score.task): score.run.result["n"] for score in scores}
    if len(set(counts.values())) == 1:
        items = f"{next(iter(counts.values()))} items a task"
    else:
        items = "items: " + ", ".join(f"{name} {n}" for name, n in counts.items()) if counts else ""
    limit = f"limit={like.config.get('limit')}" if like.config.get("limit") else "all items"
    seed, batch = like.config.get("seed"), like.config.get("batch_size")
    parts = [f"Ours: {table.model}", str(like.run.result.get("dtype", "unknown dtype")), limit, items]
    return ", ".join(part for part in [*parts, f"seed={seed}", f"batch_size={batch}"] if part) + "."


def commands(table: Table) -> list[tuple[str, str]]:
    """For each row with a cell missing, its name and the command that fills it; first the one that fills them all."""
    found = []
    for row in table.rows:
        if wanted := row.tasks("missing"):
            line = command(table.spec, table.model, table.like, row.method, row.settings, wanted)
            found.append((row.label, line))
    if found:
        found.insert(0, ("all", sweep(table.name, table.spec, table.model, table.like)))
    return found
