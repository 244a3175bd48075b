"""Choose the run of each cell, and compare it with multi-head attention (MHA) on the same items."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from string import ascii_lowercase
from typing import Any, Literal

from analysis.results.scores import Score
from analysis.stats import CELL_TOLERANCE, Comparison, Interval, Unpaired, Verdict, compare, judge, mean_over_tasks
from analysis.tables.settings import METHODS, row_name, unusual
from analysis.tables.specs import MEAN, PaperRow, Spec

#: ``missing``: no run. ``no MHA``: no run of MHA to compare with. ``refused``: the runs cannot be compared.
State = Literal["done", "missing", "no MHA", "refused"]
WIDEST = 12  # characters of a row's name; longer settings are replaced by a letter and listed below the table
Z95 = 1.959964  # half-width of a 95 % interval, in standard errors


@dataclass(frozen=True)
class Cell:
    """One method on one task, or the mean of a row."""

    task: str
    state: State
    score: Score | None = None  # our run
    value: float | None = None  # score of MHA, between 0 and 1
    stderr: float | None = None  # its standard error
    change: Comparison | None = None  # another method's score against MHA
    baseline: Score | None = None  # the run of MHA
    reason: str = ""  # why the pair is refused
    paper: Decimal | None = None  # the paper's score in %, or change in points

    @property
    def interval(self) -> Interval | None:
        """Our number, a score in % or a change in points, with its 95 % interval."""
        if self.change is not None:
            return self.change.points
        if self.value is None:
            return None
        points, half = 100 * self.value, Z95 * 100 * (self.stderr or 0)
        return Interval(points, points - half, points + half)

    @property
    def points(self) -> float | None:
        """Our number as shown."""
        return None if self.interval is None else self.interval.value

    @property
    def gap(self) -> float | None:
        """Our number minus the paper's."""
        return None if self.points is None or self.paper is None else self.points - float(self.paper)

    @property
    def verdict(self) -> Verdict | None:
        """Our number against the paper's; ``None`` if the paper has none."""
        return None if self.paper is None else judge(self.interval, "equals", float(self.paper), CELL_TOLERANCE)

    @property
    def scores(self) -> list[Score]:
        """Our run and the run of MHA, as far as there are any."""
        return [score for score in (self.score, self.baseline) if score]


@dataclass(frozen=True)
class Row:
    """A method with its settings."""

    label: str
    method: str
    settings: dict[str, Any]  # hyper-parameters that are not the method's defaults
    cells: list[Cell]
    paper: PaperRow | None  # the paper's row beside it

    @property
    def scores(self) -> list[Score]:
        """The run of each task that has one."""
        return [cell.score for cell in self.cells if cell.score]

    @property
    def saving(self) -> str:
        """Kind of saving: ``real``, ``simulated`` or ``none``; empty without a run."""
        return "/".join(sorted({score.saving for score in self.scores}))

    @property
    def saved(self) -> float | None:
        """Share of the KV cache's bytes that is saved, mean of the tasks."""
        return sum(score.saved for score in self.scores) / len(self.scores) if self.scores else None

    @property
    def changes(self) -> list[Cell]:
        """Cells of tasks that are compared with MHA."""
        return [cell for cell in self.cells if cell.change and cell.task != MEAN]

    def tasks(self, state: State) -> list[str]:
        """Return the tasks whose cells are in a state."""
        return [cell.task for cell in self.cells if cell.state == state and cell.task != MEAN]


@dataclass
class Table:
    """A table's rows and their common conditions."""

    spec: Spec
    model: str
    rows: list[Row]
    like: Score | None  # a run under the conditions of all rows; None: there are no runs
    others: list[str] = field(default_factory=list)  # other conditions, with their number of runs

    def row_of(self, method: str) -> Row | None:
        """Return a method's row with its defaults; else the one with settings that has the most tasks."""
        rows = [row for row in self.rows if row.method == method]
        return max(rows, key=lambda row: (not row.settings, len(row.tasks("done"))), default=None)


def build(spec: Spec, model: str, scores: Sequence[Score], paper: Sequence[PaperRow]) -> Table:
    """Fill a table with the runs of one model under the same conditions."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        if score.run.model == model and score.task in spec.tasks:
            groups[score.conditions_id].append(score)
    best = max(groups.values(), key=_rank, default=[])
    others = [_difference(group, best) for group in groups.values() if group is not best]
    rows = _rows(spec, best, paper) if best or paper else []
    return Table(spec, model, rows, best[0] if best else None, sorted(others))


def _rank(group: Sequence[Score]) -> tuple[int, int, float]:
    """Rank conditions: the most cells filled, then the most items, then the newest run."""
    filled = {(score.method, json.dumps(score.settings, sort_keys=True), score.task) for score in group}
    return len(filled), sum(score.n for score in group), max(score.run.updated for score in group)


def _difference(group: Sequence[Score], best: Sequence[Score]) -> str:
    """Describe runs under other conditions: ``5 runs with limit=100``."""
    other, common = group[0].conditions, best[0].conditions
    words = [f"{key}={'null' if value is None else value}" for key, value in other.items() if value != common.get(key)]
    return f"{len(group)} run{'s' if len(group) > 1 else ''} with {', '.join(words)}"


def _rows(spec: Spec, scores: Sequence[Score], paper: Sequence[PaperRow]) -> list[Row]:
    baselines = {task: score for task in spec.tasks if (score := _baseline(scores, task))}
    variants: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        variants[json.dumps([score.method, score.settings], sort_keys=True)].append(score)
    rows: list[Row] = []
    if not paper and not baselines:
        rows.append(Row(METHODS["mha"], "mha", {}, _cells(spec, [], {}, None), None))
    # A row of the paper stands beside each variant of ours that matches it, and alone without one.
    for wanted in paper:
        matching = sorted((group for group in variants.values() if _fits(group[0], wanted)), key=_order)
        rows += [_row(spec, group, baselines, wanted) for group in matching]
        if not matching:
            rows.append(Row(wanted.label, wanted.method, wanted.settings, _cells(spec, [], baselines, wanted), wanted))
    if spec.extras:
        rest = [group for group in variants.values() if not any(_fits(group[0], wanted) for wanted in paper)]
        rows += [_row(spec, group, baselines, None) for group in sorted(rest, key=_order)]
    return _lettered(rows)


def _baseline(scores: Sequence[Score], task: str) -> Score | None:
    """Return the run of MHA with the same settings_id as the most runs of a task; of several, the newest."""
    candidates = [score for score in scores if score.task == task and score.method == "mha"]
    partners = [score.settings_id for score in scores if score.task == task]
    return max(candidates, key=lambda score: (partners.count(score.settings_id), score.run.updated), default=None)


def _fits(score: Score, wanted: PaperRow) -> bool:
    settings = score.settings
    return score.method == wanted.method and all(settings.get(key, ...) == v for key, v in wanted.settings.items())


def _row_settings(score: Score) -> dict[str, Any]:
    """Return the settings that a row shows: the unusual ones, and sparsity always."""
    return unusual(score) | {key: value for key, value in score.settings.items() if key == "sparsity"}


def _order(group: Sequence[Score]) -> tuple[int, str, tuple[tuple[str, float, str], ...]]:
    """Order rows by method as in :data:`METHODS`, then settings by value: k=4 before k=16."""
    first, known = group[0], list(METHODS)
    place = known.index(first.method) if first.method in known else len(known)
    settings = sorted(_row_settings(first).items())
    return place, first.method, tuple((k, v if isinstance(v, (int, float)) else 0.0, str(v)) for k, v in settings)


def _row(spec: Spec, group: Sequence[Score], baselines: Mapping[str, Score], paper: PaperRow | None) -> Row:
    method, settings = group[0].method, _row_settings(group[0])
    if paper is None:
        label = row_name(method, settings)
    else:
        label = paper.label + row_name("", {k: v for k, v in settings.items() if k not in paper.settings})
    return Row(label, method, settings, _cells(spec, group, baselines, paper), paper)


def _lettered(rows: list[Row]) -> list[Row]:
    """Replace the settings by a letter in names that are too long for a column or not unique."""
    labels = [row.label for row in rows]
    letters = iter(ascii_lowercase)
    renamed = []
    for row in rows:
        label = row.label
        if row.settings and (len(label) > WIDEST or labels.count(label) > 1):
            name = row.paper.label if row.paper else METHODS.get(row.method, row.method)
            label = f"{name} ({next(letters, '?')})"
        renamed.append(replace(row, label=label))
    return renamed


def _cells(spec: Spec, group: Sequence[Score], baselines: Mapping[str, Score], paper: PaperRow | None) -> list[Cell]:
    cells = []
    for task in spec.tasks:
        scores = [score for score in group if score.task == task]
        cell = _cell(task, scores, baselines.get(task))
        cells.append(replace(cell, paper=paper.values.get(task) if paper else None))
    return [*cells, _mean(cells)] if spec.mean else cells


def _cell(task: str, scores: Sequence[Score], baseline: Score | None) -> Cell:
    if not scores:
        return Cell(task, "missing")
    if baseline is None:
        return Cell(task, "no MHA", max(scores, key=lambda score: score.run.updated))
    # Prefer a run that can be compared; of several (with other library versions, for example) the newest.
    score = max(scores, key=lambda score: (score.settings_id == baseline.settings_id, score.run.updated))
    if score.method == "mha":
        return Cell(task, "done", baseline, baseline.value, baseline.stderr, baseline=baseline)
    try:
        if score.settings_id != baseline.settings_id:
            raise Unpaired("no MHA run with the same settings_id, so other data or settings")
        change = compare(baseline.samples, score.samples, score.metric)
    except Unpaired as error:
        return Cell(task, "refused", score, baseline=baseline, reason=str(error))
    return Cell(task, "done", score, change=change, baseline=baseline)


def _mean(cells: Sequence[Cell]) -> Cell:
    """Return the mean of a row; missing if a cell is."""
    if any(cell.state != "done" for cell in cells):
        return Cell(MEAN, "missing")
    changes = [cell.change for cell in cells if cell.change is not None]
    if changes:
        return Cell(MEAN, "done", change=mean_over_tasks(changes))
    values = [cell.value for cell in cells if cell.value is not None]
    errors = [cell.stderr for cell in cells if cell.stderr is not None]
    error = math.hypot(*errors) / len(errors) if len(errors) == len(values) else None
    return Cell(MEAN, "done", value=sum(values) / len(values), stderr=error)
