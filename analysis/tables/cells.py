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
from analysis.stats import (
    ALPHA,
    MARGIN,
    Comparison,
    Interval,
    Unpaired,
    Verdict,
    compare_seeds,
    holm,
    judge,
    mean_over_tasks,
)
from analysis.tables.settings import METHODS, row_name, unusual
from analysis.tables.specs import MEAN, PaperRow, Spec

#: ``missing``: no run. ``no MHA``: no run of MHA to compare with. ``refused``: the runs cannot be compared.
State = Literal["done", "missing", "no MHA", "refused"]
WIDEST = 12  # characters of a row's name; longer settings are replaced by a letter and listed below the table
Z95 = 1.959964  # half-width of a 95 % interval, in standard errors
SEEDS = 5  # fewest runs of a method with chance in it


@dataclass(frozen=True)
class Cell:
    """One method on one task, or the mean of a row."""

    task: str
    state: State
    score: Score | None = None  # our run; of several seeds, the first
    value: float | None = None  # score of MHA, between 0 and 1
    stderr: float | None = None  # its standard error
    change: Comparison | None = None  # another method's score against MHA
    baseline: Score | None = None  # the run of MHA
    runs: tuple[Score, ...] = ()  # our run of each seed, if it is compared
    p_holm: float | None = None  # of the change, corrected for the table's comparisons
    p_equal_holm: float | None = None  # of equivalence with MHA, corrected in the same way
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
        return None if self.paper is None else judge(self.interval, "equals", float(self.paper), MARGIN)

    @property
    def is_equal(self) -> bool:
        """Whether it is shown that the change is at most :data:`MARGIN` points (two one-sided tests, Holm)."""
        return self.p_equal_holm is not None and self.p_equal_holm < ALPHA

    @property
    def scores(self) -> list[Score]:
        """Our run of each seed and the run of MHA, as far as there are any."""
        ours = self.runs or ((self.score,) if self.score else ())
        return [*ours, *([self.baseline] if self.baseline else [])]


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
        """The run of each task that has one; of several seeds, the first."""
        return [cell.score for cell in self.cells if cell.score]

    @property
    def all_scores(self) -> list[Score]:
        """The runs of all tasks and seeds."""
        return [score for cell in self.cells for score in (cell.runs or ((cell.score,) if cell.score else ()))]

    @property
    def seeds(self) -> int:
        """Number of seeds, of the task that has the fewest; 0 without a run."""
        return min((len(cell.runs) for cell in self.cells if cell.runs), default=0)

    @property
    def too_few_seeds(self) -> bool:
        """Whether the method has chance in it and was run with fewer seeds than :data:`SEEDS`."""
        return 0 < self.seeds < SEEDS and any(score.has_chance for score in self.scores)

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
    like = next((score for score in best if score.method == "mha"), best[0]) if best else None
    return Table(spec, model, _corrected(rows), like, sorted(others))


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """Add Holm's p-values: cells of tasks are one family of comparisons, means of rows another."""
    adjusted: dict[tuple[int, int], Cell] = {}
    places = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row.cells) if cell.change is not None]
    for is_mean in (False, True):
        family = [(i, j) for i, j in places if (rows[i].cells[j].task == MEAN) == is_mean]
        changes = [change for i, j in family if (change := rows[i].cells[j].change) is not None]
        different = holm([change.p for change in changes])
        equal = holm([change.p_equal(MARGIN / 100) for change in changes])
        for (i, j), p, p_equal in zip(family, different, equal, strict=True):
            adjusted[i, j] = replace(rows[i].cells[j], p_holm=p, p_equal_holm=p_equal)
    return [
        replace(row, cells=[adjusted.get((i, j), cell) for j, cell in enumerate(row.cells)])
        for i, row in enumerate(rows)
    ]


def _rank(group: Sequence[Score]) -> tuple[int, int, float]:
    """Rank conditions: the most cells filled, then the most items, then the newest run."""
    filled = {(score.method, json.dumps(score.replicate[1], sort_keys=True), score.task) for score in group}
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
        variants[json.dumps([score.method, score.replicate[1]], sort_keys=True)].append(score)
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
    """Return the run of MHA that the most runs of a task can be compared with; of several, the newest."""
    partners = [score for score in scores if score.task == task]
    candidates = [score for score in partners if score.method == "mha"]
    return max(
        candidates,
        key=lambda mha: (sum(mha.is_pair(score) for score in partners), mha.run.updated),
        default=None,
    )


def _fits(score: Score, wanted: PaperRow) -> bool:
    settings = score.settings
    return score.method == wanted.method and all(settings.get(key, ...) == v for key, v in wanted.settings.items())


def _row_settings(score: Score) -> dict[str, Any]:
    """Return the settings that a row shows: the unusual ones but the seed, and sparsity always."""
    shown = unusual(score) | {key: value for key, value in score.settings.items() if key == "sparsity"}
    return {key: value for key, value in shown.items() if key != "seed"}


def _order(group: Sequence[Score]) -> tuple[int, str, tuple[tuple[str, float, str], ...]]:
    """Order rows by method as in :data:`METHODS`, then settings by value: k=4 before k=16."""
    first, known = group[0], list(METHODS)
    place = known.index(first.method) if first.method in known else len(known)
    settings = sorted(_row_settings(first).items())
    return place, first.method, tuple((k, v if isinstance(v, (int, float)) else 0.0, str(v)) for k, v in settings)


def _row(spec: Spec, group: Sequence[Score], baselines: Mapping[str, Score], paper: PaperRow | None) -> Row:
    method, settings = group[0].method, _row_settings(group[0])
    if "predictor" in settings:  # of each training
        settings["predictor"] = ",".join(dict.fromkeys(str(score.settings["predictor"]) for score in group))
    if paper is None:
        label = row_name(method, settings)
    else:
        label = paper.label + row_name("", {k: v for k, v in settings.items() if k not in paper.settings})
    return Row(label, method, settings, _cells(spec, group, baselines, paper), paper)


def _lettered(rows: list[Row]) -> list[Row]:
    """Shorten names that are too long for a column or not unique: the settings are replaced by a letter.

    A head profile needs no letter if no other row has the name: the method is the same, only its counts are from there.
    """
    labels, bases = [row.label for row in rows], [_base_label(row) for row in rows]
    letters = iter(ascii_lowercase)
    renamed = []
    for row, base in zip(rows, bases, strict=True):
        label = row.label
        if row.settings and (len(label) > WIDEST or labels.count(label) > 1):
            only_profile = set(row.settings) == {"profile"} and bases.count(base) == 1
            label = base if only_profile else f"{base} ({next(letters, '?')})"
        renamed.append(replace(row, label=label))
    return renamed


def _base_label(row: Row) -> str:
    return row.paper.label if row.paper else METHODS.get(row.method, row.method)


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
    # Of each seed, prefer a run that can be compared; of several (with other library versions, for example) the newest.
    by_seed: dict[int, Score] = {}
    for score in sorted(scores, key=lambda score: (score.is_pair(baseline), score.run.updated)):
        by_seed[score.replicate[0]] = score
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    if runs[0].method == "mha":
        return Cell(task, "done", baseline, baseline.value, baseline.stderr, baseline=baseline)
    try:
        if not all(score.is_pair(baseline) for score in runs):
            raise Unpaired("no MHA run with the same settings_id, so other data or settings")
        samples = {score.replicate[0]: score.samples for score in runs}
        change = compare_seeds(baseline.samples, samples, baseline.metric)
    except Unpaired as error:
        return Cell(task, "refused", runs[0], baseline=baseline, reason=str(error))
    return Cell(task, "done", runs[0], change=change, baseline=baseline, runs=tuple(runs))


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
