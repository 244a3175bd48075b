"""Make text of a table: for each row our numbers, their intervals, the paper's numbers and the gaps; then notes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import zip_longest

from analysis.stats import LEVEL, MARGIN
from analysis.tables.cells import SEEDS, Cell, Row, Table
from analysis.tables.settings import assignments, command, profile_of, row_name, sweep
from analysis.tables.specs import MEAN, at_chance, chance_levels, task_name

STARS = ((0.01, "**"), (0.05, "*"))
EQUAL = "="  # a change that is shown to be within the margin
FEW = "†"  # a row of a method with chance in it that has too few seeds
#: Methods whose clusters come from the same offline phase, so that a comparison needs the same numbers of clusters.
SAME_COUNTS = ("chai_static", "chai_qkv")


def header(table: Table) -> list[str]:
    """Return the names of the columns."""
    return ["Method", *_line_kind(table, ""), *map(task_name, table.spec.columns), "KV saved"]


def _line_kind(table: Table, name: str) -> list[str]:
    """Return the cell that names the kind of a line; none if the table has one number and its interval only."""
    return [name] if any(_has_paper(row) or row.seeds > 1 for row in table.rows) else []


def _has_paper(row: Row) -> bool:
    return any(cell.paper is not None for cell in row.cells)


def block(table: Table, row: Row) -> list[list[str]]:
    """Return the lines of one row, each as its cells: name, kind of line, tasks, saving."""
    lines = [[*_line_kind(table, "ours"), *map(cell_text, row.cells)]]
    if any(cell.change for cell in row.cells):
        lines.append([*_line_kind(table, f"{100 * LEVEL:g} %"), *map(interval_text, row.cells)])
    if row.seeds > 1:
        lines.append([f"sd of {row.seeds}", *map(sd_text, row.cells)])
    if _has_paper(row):
        lines.append(["paper", *(paper_text(row, cell) for cell in row.cells)])
        if any(cell.gap is not None for cell in row.cells):
            lines.append(["gap", *("" if cell.gap is None else signed(cell.gap) for cell in row.cells)])
    # The share saved goes on a line of its own if there is one.
    saving = [row.saving] if row.saved is None or row.saving == "none" else [row.saving, f"{100 * row.saved:.1f} %"]
    if len(lines) < len(saving):
        saving = [" ".join(saving)]
    ends = zip_longest([row.label + (f" {FEW}" if row.too_few_seeds else "")], saving, lines, fillvalue="")
    return [[name, *line, share] for name, share, line in ends]


def signed(points: float) -> str:
    """Format with one decimal and a sign; no sign for what rounds to zero."""
    text = f"{points:+.1f}"
    return "0.0" if float(text) == 0 else text


def value_text(cell: Cell) -> str:
    """Format our number, a change with stars for its significance and a sign if it is equal; without one, the state."""
    if cell.points is None:
        return cell.state
    if cell.change is None or cell.p_holm is None:
        return f"{cell.points:.1f}"
    stars = next((mark for limit, mark in STARS if cell.p_holm < limit), "")
    return signed(cell.points) + stars + (f" {EQUAL}" if cell.is_equal else "")


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
    return f"{signed(cell.change.points.low)}…{signed(cell.change.points.high)}"


def sd_text(cell: Cell) -> str:
    """Format the standard deviation of a change over the seeds, in points."""
    return "" if cell.change is None or cell.change.sd is None else f"{100 * cell.change.sd:.1f}"


def paper_text(row: Row, cell: Cell) -> str:
    """Format the paper's number with the digits that it has there."""
    if cell.paper is None:
        return ""
    return f"{cell.paper}" if row.method == "mha" or not cell.paper else f"{cell.paper:+}"


def notes(table: Table) -> list[str]:
    """Return notes on how to read the table, its conditions, and what it does not show."""
    lines = []
    if table.like is not None:
        lines += _tests(table)
    if any(map(_has_paper, table.rows)):
        lines.append("paper: its numbers" + ("; gap: ours minus the paper's." if table.like else "."))
    if table.like is not None:
        lines.append(
            "KV saved: share of the cache's live bytes, mean of the tasks; real: less is stored and computed, "
            "simulated: masked only."
        )
        lines.append(_conditions(table))
    for row in table.rows:
        if row.settings and _is_shortened(row):
            lines.append(f"{row.label}: {', '.join(assignments(row.settings))}.")
    lines += _chance(table)
    lines += _counts(table)
    if table.others:
        lines.append(f"Not shown, because runs are compared under the same settings only: {'; '.join(table.others)}.")
    for row in table.rows:
        refused = [cell for cell in row.cells if cell.state == "refused"]
        lines += [f"Refused: {row.label} on {cell.task}: {cell.reason}." for cell in refused]
        if row.paper and row.paper.note and _has_paper(row):
            lines.append(f"Paper, {row.paper.source}, {row.paper.label}: {row.paper.note}.")
    return list(dict.fromkeys(lines))  # several rows of ours can stand beside one of the paper


def _is_shortened(row: Row) -> bool:
    """Return whether a row's name does not show its settings."""
    shown = row.paper.settings if row.paper else {}
    hidden = {key: value for key, value in row.settings.items() if key not in shown}
    return bool(hidden) and row_name("", hidden) not in row.label


def _tests(table: Table) -> list[str]:
    """Describe the tests of the numbers, and the families that they are corrected for."""
    changes = [cell for row in table.rows for cell in row.cells if cell.change is not None]
    cells, means = ([cell for cell in changes if (cell.task == MEAN) == is_mean] for is_mean in (False, True))
    several = any(row.seeds > 1 for row in table.rows)
    sources, inverted = ("; with several seeds, of items and seeds", "; with several seeds, from the interval")
    if not several:
        sources = inverted = ""
    lines = [
        f"MHA: % ± standard error. Others: points against MHA on the same items, below them the {100 * LEVEL:g} % "
        f"interval (Tango's score interval of the items{sources}).",
        f"* p < 0.05, ** p < 0.01 (McNemar, exact{inverted}), "
        f"corrected by Holm's method for the {len(cells)} comparisons of a method with MHA on a task in this table. "
        f"{EQUAL} equal to MHA within {MARGIN:g} points (two one-sided tests, p < 0.05, also corrected).",
    ]
    if table.spec.mean:
        lines.append(
            "Mean: each task counts the same; its p is of a permutation test of the mean, and corrected for the "
            f"{len(means)} means."
        )
    if several:
        lines.append(
            "sd of n: standard deviation over n seeds of the method, in points; the number above is their mean."
        )
    if any(row.too_few_seeds for row in table.rows):
        lines.append(
            f"{FEW} fewer than {SEEDS} seeds of a method with chance in it: how far seeds differ is not known."
        )
    if any(row.method.startswith("chai") and row.scores for row in table.rows):
        lines.append("CHAI's clustering (Ward's tree, then exchange) is deterministic: it has no seed.")
    return lines


def _chance(table: Table) -> list[str]:
    """Name the paper's own scores that are not above chance, if any."""
    found = at_chance([row.paper for row in table.rows if row.paper is not None])
    levels, lines = chance_levels(), []
    for source, labels in _by_source(table, found).items():
        words = [
            f"{label} {', '.join(f'{task_name(task)} {score:.1f}' for task, score in found[label].items())}"
            for label in labels
        ]
        tasks = [task for task in levels if any(task in found[label] for label in labels)]
        level = ", ".join(f"{task_name(task)} {levels[task].level} ({levels[task].how})" for task in tasks)
        lines.append(f"Paper, {source}: not above chance are its scores of {'; '.join(words)}. Chance: {level}.")
    return lines


def _by_source(table: Table, labels: Container[str]) -> dict[str, list[str]]:
    """Return some of the paper's rows by their place in the paper."""
    places: dict[str, list[str]] = {}
    for row in table.rows:
        if row.paper and row.paper.label in labels and row.paper.label not in places.setdefault(row.paper.source, []):
            places[row.paper.source].append(row.paper.label)
    return places


def _counts(table: Table) -> list[str]:
    """Name the rows whose numbers of clusters are not those of any row of CHAI."""
    counts = {score.heads_kept for row in table.rows if row.method == "chai" for score in row.scores}
    return [
        f"{row.label} has other numbers of clusters than CHAI ({sum(kept)} of the layers' heads in all, CHAI "
        f"{' or '.join(str(sum(one)) for one in sorted(counts))}): it is not comparable with CHAI. Run CHAI with the "
        "same head profile (method.profile)."
        for row in table.rows
        if row.method in SAME_COUNTS and counts
        for kept in sorted({score.heads_kept for score in row.scores} - counts)
    ]


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
    batch = like.config.get("batch_size")
    parts = [f"Ours: {table.model}", like.run.dtype, limit, items, f"batch_size={batch}"]
    return ", ".join(filter(None, parts)) + "."


def commands(table: Table) -> list[tuple[str, str]]:
    """Return name and command for each row with a cell missing, after the command that fills all of them."""
    lines = []
    for row in table.rows:
        # Of a method with too few seeds, all tasks are run again; seeds that are complete are skipped.
        tasks = row.tasks("missing") or (list(table.spec.tasks) if row.too_few_seeds and row.method == "random" else [])
        if tasks:
            lines.append((row.label, fill(table, row, tasks)))
    if lines:
        lines.insert(0, ("all", sweep(table.spec, table.model, table.like)))
    return lines


def fill(table: Table, row: Row, tasks: Sequence[str]) -> str:
    """Return the command that fills some cells of a row, with all seeds of a method that takes them."""
    seeds, settings = range(SEEDS) if row.method == "random" else (), row.settings
    if table.spec.profile and row.method in ("chai", "chai_qkv") and not row.scores:
        settings = settings | {"profile": profile_of(table.model)}
    return command(table.spec, table.model, table.like, row.method, settings, tasks, seeds)
