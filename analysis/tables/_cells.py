"""Which run fills which cell, and how it compares with multi-head attention on the same items."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from string import ascii_lowercase
from typing import Any, Literal

from analysis.paired import Comparison, Unpaired, compare, mean_over_tasks
from analysis.scores import Score
from analysis.tables._settings import METHODS, WIDEST, row_name, unusual
from analysis.tables._specs import MEAN, PaperRow, Spec

#: ``missing``: no run. ``no MHA``: none to compare with. ``refused``: there is one, but not on the same items.
State = Literal["done", "missing", "no MHA", "refused"]


@dataclass(frozen=True)
class Cell:
    """One method on one task, or the mean of a row.

    Attributes:
        task: the column.
        state: whether the numbers are there.
        score: our run, where there is one.
        value: the score of a run of multi-head attention, a fraction of one.
        stderr: its standard error.
        change: another method's score against that.
        baseline: the run that it is compared with.
        reason: why a pair is refused.
        paper: the paper's score in %, or change in points.
    """

    task: str
    state: State
    score: Score | None = None
    value: float | None = None
    stderr: float | None = None
    change: Comparison | None = None
    baseline: Score | None = None
    reason: str = ""
    paper: Decimal | None = None

    @property
    def points(self) -> float | None:
        """Our number as it is shown: a score in %, or a change in points."""
        value = self.value if self.change is None else self.change.difference
        return None if value is None else 100 * value

    @property
    def gap(self) -> float | None:
        """Our number less the paper's."""
        return None if self.points is None or self.paper is None else self.points - float(self.paper)


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    Attributes:
        label: its name in the table.
        method: its name on the command line.
        settings: hyper-parameters that aren't the method's defaults.
        cells: one for each column.
        paper: the paper's row beside it.
    """

    label: str
    method: str
    settings: dict[str, Any]
    cells: list[Cell]
    paper: PaperRow | None

    @property
    def saving(self) -> str:
        """``real``, ``simulated`` or ``none``; empty without a run."""
        return "/".join(sorted({cell.score.saving for cell in self.cells if cell.score}))

    @property
    def saved(self) -> float | None:
        """The share of the K,V bytes that is saved, mean of the tasks."""
        shares = [cell.score.saved for cell in self.cells if cell.score]
        return sum(shares) / len(shares) if shares else None

    def tasks(self, state: State) -> list[str]:
        """The columns whose cells are in a state."""
        return [cell.task for cell in self.cells if cell.state == state and cell.task != MEAN]


@dataclass
class Table:
    """A table's rows and what they have in common.

    Attributes:
        name: on the command line.
        spec: what it holds.
        model: whose runs it shows.
        columns: tasks, and the mean where wanted.
        rows: in order.
        like: a run under the conditions that all runs shown share; ``None``: there are no runs.
        others: under which other conditions there are how many runs that aren't shown.
    """

    name: str
    spec: Spec
    model: str
    columns: list[str]
    rows: list[Row]
    like: Score | None
    others: list[str] = field(default_factory=list)


def build(name: str, spec: Spec, model: str, scores: Sequence[Score], paper: Sequence[PaperRow]) -> Table:
    """Fill a table with the runs of one model under the same conditions."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        if score.run.model == model and score.task in spec.tasks:
            groups[score.conditions_id].append(score)
    columns = [*spec.tasks, *([MEAN] if spec.mean else [])]
    if not groups:
        rows = [Row(row.label, row.method, row.settings, _cells(spec, [], {}, row), row) for row in paper]
        return Table(name, spec, model, columns, rows, None)
    chosen = max(groups.values(), key=_worth)
    others = [_difference(group, chosen) for group in groups.values() if group is not chosen]
    return Table(name, spec, model, columns, _rows(spec, chosen, paper), chosen[0], sorted(others))


def _worth(group: Sequence[Score]) -> tuple[int, int, float]:
    """Which conditions to show: those with the most cells filled, then those with the most items, then the newest."""
    filled = {(score.method, json.dumps(score.settings, sort_keys=True), score.task) for score in group}
    return len(filled), sum(score.run.result["n"] for score in group), max(score.run.updated for score in group)


def _difference(group: Sequence[Score], chosen: Sequence[Score]) -> str:
    """``5 runs with limit=100``: how other runs differ from those shown."""
    own, shown = group[0].conditions, chosen[0].conditions
    words = [f"{key}={'null' if own.get(key) is None else own[key]}" for key in own if own[key] != shown.get(key)]
    return f"{len(group)} run{'s' if len(group) > 1 else ''} with {', '.join(words)}"


def _rows(spec: Spec, scores: Sequence[Score], paper: Sequence[PaperRow]) -> list[Row]:
    baselines = {task: found for task in spec.tasks if (found := _baseline(scores, task))}
    variants: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        variants[json.dumps([score.method, score.settings], sort_keys=True)].append(score)
    rows: list[Row] = []
    if not paper and not baselines:
        rows.append(Row(METHODS["mha"], "mha", {}, _cells(spec, [], {}, None), None))
    for wanted in paper:
        matching = sorted((group for group in variants.values() if _fits(group[0], wanted)), key=_order)
        for group in matching:
            rows.append(_row(spec, group, baselines, wanted))
        if not matching:
            rows.append(Row(wanted.label, wanted.method, wanted.settings, _cells(spec, [], baselines, wanted), wanted))
    if spec.extras:
        rest = [group for group in variants.values() if not any(_fits(group[0], wanted) for wanted in paper)]
        rows += [_row(spec, group, baselines, None) for group in sorted(rest, key=_order)]
    return _lettered(rows)


def _baseline(scores: Sequence[Score], task: str) -> Score | None:
    """The run of multi-head attention that most runs of a task can be compared with; then the newest."""
    found = [score for score in scores if score.task == task and score.method == "mha"]
    partners = [score.settings_id for score in scores if score.task == task]
    return max(found, key=lambda score: (partners.count(score.settings_id), score.run.updated), default=None)


def _fits(score: Score, wanted: PaperRow) -> bool:
    settings = score.settings
    return score.method == wanted.method and all(settings.get(key, ...) == v for key, v in wanted.settings.items())


def _order(group: Sequence[Score]) -> tuple[int, str, tuple[tuple[str, float, str], ...]]:
    """Methods in the order of their names' list, settings by value: k=4 before k=16."""
    first = group[0]
    known = list(METHODS)
    place = known.index(first.method) if first.method in known else len(known)
    numbers = unusual(first) | {key: v for key, v in first.settings.items() if key == "sparsity"}
    keys = tuple((key, v if isinstance(v, (int, float)) else 0.0, str(v)) for key, v in sorted(numbers.items()))
    return place, first.method, keys


def _row(spec: Spec, group: Sequence[Score], baselines: dict[str, Score], paper: PaperRow | None) -> Row:
    first = group[0]
    settings = unusual(first) | {key: value for key, value in first.settings.items() if key == "sparsity"}
    if paper is None:
        label = row_name(first.method, settings)
    else:
        own = {key: value for key, value in settings.items() if key not in paper.settings}
        label = paper.label + row_name("", own)
    return Row(label, first.method, settings, _cells(spec, group, baselines, paper), paper)


def _lettered(rows: list[Row]) -> list[Row]:
    """Names that are too long for a column, or that two rows have, get a letter instead of the settings."""
    labels = [row.label for row in rows]
    letters = iter(ascii_lowercase)
    short = []
    for row in rows:
        label = row.label
        if row.settings and (len(label) > WIDEST or labels.count(label) > 1):
            name = row.paper.label if row.paper else METHODS.get(row.method, row.method)
            label = f"{name} ({next(letters, '?')})"
        short.append(replace(row, label=label))
    return short


def _cells(spec: Spec, group: Sequence[Score], baselines: dict[str, Score], paper: PaperRow | None) -> list[Cell]:
    cells = []
    for task in spec.tasks:
        baseline = baselines.get(task)
        number = paper.values.get(task) if paper else None
        own = [score for score in group if score.task == task]
        cells.append(_cell(task, own, baseline, number))
    return [*cells, _mean(cells)] if spec.mean else cells


def _cell(task: str, own: Sequence[Score], baseline: Score | None, paper: Decimal | None) -> Cell:
    if not own:
        return Cell(task, "missing", paper=paper)
    if baseline is None:
        return Cell(task, "no MHA", max(own, key=lambda score: score.run.updated), paper=paper)
    # Comparable runs first; of several (one method under other libraries, say) the newest.
    score = max(own, key=lambda score: (score.settings_id == baseline.settings_id, score.run.updated))
    if score.method == "mha":
        return Cell(task, "done", baseline, baseline.value, baseline.stderr, baseline=baseline, paper=paper)
    if score.settings_id != baseline.settings_id:
        reason = "no MHA run with the same settings_id, so other data or settings"
        return Cell(task, "refused", score, baseline=baseline, reason=reason, paper=paper)
    try:
        change = compare(baseline.samples, score.samples, score.metric)
    except Unpaired as error:
        return Cell(task, "refused", score, baseline=baseline, reason=str(error), paper=paper)
    return Cell(task, "done", score, change=change, baseline=baseline, paper=paper)


def _mean(cells: Sequence[Cell]) -> Cell:
    """Of a whole row; with a cell missing there is none."""
    if any(cell.state != "done" for cell in cells):
        return Cell(MEAN, "missing")
    changes = [cell.change for cell in cells if cell.change is not None]
    if changes:
        return Cell(MEAN, "done", change=mean_over_tasks(changes))
    values = [cell.value for cell in cells if cell.value is not None]
    errors = [cell.stderr for cell in cells if cell.stderr is not None]
    error = math.hypot(*errors) / len(errors) if len(errors) == len(values) else None
    return Cell(MEAN, "done", value=sum(values) / len(values), stderr=error)
