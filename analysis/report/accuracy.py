"""Our numbers for the paper's claims about accuracy, from filled tables of the runs that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from analysis.figures import fig1
from analysis.plotting import paper
from analysis.plotting.style import clusters, label
from analysis.report.conditions import PassedOver, heads_kept
from analysis.report.source import MISSING, Ours, Source
from analysis.results.runs import MissingRun, Run
from analysis.stats import LEVEL, Comparison, Interval, Unpaired, compare_seeds, mean_over_tasks
from analysis.tables.cells import Cell, Row, Table
from analysis.tables.layout import commands
from analysis.tables.settings import METHODS, defaults, row_name
from analysis.tables.specs import task_name

FIGURE1 = "python run.py -m paper=figure1"


def worst_loss(source: Source, model: str, tables: str) -> Ours:
    """Return CHAI's largest loss on any task of some tables, points."""
    cells: list[tuple[Table, Cell]] = []
    missing: list[str] = []
    for table in (source.tables[name] for name in tables.split(",")):
        source.pass_scores(table.model, ("mha", "chai"), table.spec.tasks)
        row = _row(table, "chai")
        changes = _compared(row) if row else []
        cells += [(table, cell) for cell in changes]
        if row is None or len(changes) < len(table.spec.tasks):
            missing += _commands_of(table, METHODS["chai"])
    if not cells:
        raise MissingRun(MISSING, *missing)
    return _loss(cells, tuple(missing))


def unchanged_weights(source: Source, model: str, tables: str) -> Ours:
    """Return on how many pairs of a model and a data set CHAI ran with the very weights of MHA."""
    pairs: list[Cell] = []
    missing: list[str] = []
    for table in (source.tables[name] for name in tables.split(",")):
        source.pass_scores(table.model, ("mha", "chai"), table.spec.tasks)
        row = _row(table, "chai")
        found = _compared(row) if row else []
        pairs += found
        if len(found) < len(table.spec.tasks):
            missing += _commands_of(table, METHODS["chai"])
    if not pairs:
        raise MissingRun(MISSING, *missing)
    runs = [score.run for cell in pairs for score in cell.scores]
    certainty = "same model file and revision as MHA (settings_id)"
    # Pairs that are not run yet neither keep the claim nor break it.
    wanted = sum(len(source.tables[name].spec.tasks) for name in tables.split(","))
    interval = Interval(len(pairs), len(pairs), wanted if missing else len(pairs))
    return Ours(interval, certainty, runs, "", "MHA, same weights", tuple(missing))


def loss(source: Source, model: str, table: str, row: str, task: str) -> Ours:
    """Return a method's loss on one task, points."""
    whole = source.tables[table]
    wanted = [one for one in whole.rows if one.paper is not None and one.paper.label == row]
    source.pass_scores(whole.model, ("mha", *(one.method for one in wanted)), (task,))
    for one in wanted:
        for cell in _compared(one):
            if cell.task == task:
                return _loss([(whole, cell)])
    raise MissingRun(MISSING, *_commands_of(whole, row))


def agreeing_cells(source: Source, model: str, table: str) -> Ours:
    """Return how many numbers of a table of the paper are reproduced; the ends count none and all that are open."""
    whole = source.tables[table]
    source.pass_scores(whole.model, tuple(METHODS), whole.spec.tasks)
    verdicts: dict[tuple[str, str], list[str]] = {}
    runs: list[Run] = []
    for row in whole.rows:
        for cell in row.cells if row.paper else ():
            if cell.paper is not None and cell.verdict is not None and row.paper:
                verdicts.setdefault((row.paper.label, cell.task), []).append(cell.verdict)
                runs += [score.run for score in cell.scores]
    # Several runs of one number of the paper: that with the paper's settings is the first.
    first = [found[0] for found in verdicts.values()]
    reproduced, broken, missing = (first.count(word) for word in ("reproduced", "not reproduced", "not run yet"))
    lines = tuple(line for _, line in commands(whole)) if missing else ()
    if missing == len(first):
        raise MissingRun(MISSING, *lines)
    detail = f"{broken} not reproduced, {len(first) - reproduced - broken - missing} undecided, {missing} not run yet"
    interval = Interval(reproduced, reproduced, len(first) - broken)
    return Ours(interval, f"of {len(first)} numbers; the upper end counts what is open", runs, detail, "MHA", lines)


def _row(table: Table, method: str) -> Row | None:
    """Return a method's row with its default settings only: a count for all layers, for example, is another row."""
    row = table.row_of(method)
    return row if row is not None and set(row.settings) <= {"profile", "clusters"} else None


def _compared(row: Row) -> list[Cell]:
    """Return the cells that are compared with MHA in the same dtype."""
    return [cell for cell in row.changes if len({score.run.dtype for score in cell.scores}) == 1]


def _commands_of(table: Table, row: str) -> list[str]:
    """Return the commands that fill a row and MHA's; if only refused cells are missing, one that runs all again."""
    lines = [line for label, line in commands(table) if label in ("MHA", row)]
    method = next((name for name, words in METHODS.items() if words == row), "chai")
    return lines or [f"python run.py -m method=mha,{method} model={table.model} task={_task_word(table)} force=true"]


def _task_word(table: Table) -> str:
    return table.spec.whole or ",".join(table.spec.tasks)


def _loss(cells: Sequence[tuple[Table, Cell]], missing: tuple[str, ...] = ()) -> Ours:
    """Return the largest loss of some cells: the maximum of the estimates, and of each end of the intervals."""
    losses = [-exact_points(cell.change) for _, cell in cells if cell.change]
    worst = Interval(*(max(getattr(one, end) for one in losses) for end in ("value", "low", "high")))
    table, cell = cells[int(np.argmax([one.value for one in losses]))]
    scores = [score for _, cell in cells for score in cell.scores]
    n = sum(cell.change.n for _, cell in cells if cell.change)
    counts: dict[str, set[tuple[int, ...]]] = {}
    for one, each in cells:
        if each.score:
            counts.setdefault(one.model, set()).add(tuple(heads_kept(each.score.run)))
    mixed = [label(name) for name, found in counts.items() if len(found) > 1]
    caveat = f"the tasks of {', '.join(mixed)} ran with different cluster counts" if mixed else ""
    detail = f"{task_name(cell.task)}, {label(table.model)}"
    certainty, runs = f"exact, paired, {n:,} items", [score.run for score in scores]
    return Ours(worst, certainty, runs, detail, "MHA, same items", missing, caveat)


def exact_points(change: Comparison) -> Interval:
    """Return a paired change in points, with an interval that covers it with at least 95 % for any number of flips.

    The mean of several seeds keeps its own interval, which is of the seeds as well as of the items.

    The items lost and those gained are binomial numbers; each has the interval of Clopper and Pearson, at a level by
    which both hold at once (Bonferroni).
    """
    if len(change.by_seed) > 1:
        return change.points
    level = (1 + LEVEL) / 2
    lost, gained = (
        binomtest(int(count), change.n).proportion_ci(level, method="exact") for count in (change.lost, change.gained)
    )
    return Interval(100 * change.difference, 100 * (gained.low - lost.high), 100 * (gained.high - lost.low))


def tradeoff(source: Source, model: str, method: str, table: str) -> Ours:
    """Return CHAI's mean accuracy minus that of a method's best point of no more operations, points.

    If all its points have more operations than CHAI, the cheapest is compared.
    """
    whole = source.tables[table]
    source.pass_scores(whole.model, ("mha", "chai", method), whole.spec.tasks)
    own = _row(whole, "chai")
    mine = {cell.task: cell.score for cell in _compared(own) if cell.score} if own else {}
    rivals = []
    for row in whole.rows if mine else ():
        compared = {cell.task: cell for cell in _compared(row) if cell.score}
        scores = {task: cell.score for task, cell in compared.items() if cell.score}
        if row.method != method or set(scores) != set(mine) or len(mine) < len(whole.spec.tasks):
            continue
        counts = {(tuple(heads_kept(scores[task].run)), tuple(heads_kept(mine[task].run))) for task in mine}
        # The static variant is a variant of CHAI: without the same counts, the counts are compared.
        if method == "chai_static" and any(theirs != ours for theirs, ours in counts):
            reason = "other counts than CHAI's: " + "; CHAI ".join(map(clusters, next(iter(counts))))
            source.passed += [PassedOver(score.run, reason) for score in scores.values()]
            continue
        costs = [[_operations(one.run) for one in group.values()] for group in (scores, mine)]
        if all(cost is not None for group in costs for cost in group):
            seeds = {task: cell.runs or (scores[task],) for task, cell in compared.items()}
            rivals.append((row, seeds, *(float(np.mean(group)) for group in costs)))
    if not rivals:
        lines = _commands_of(whole, METHODS["chai"]) if len(mine) < len(whole.spec.tasks) else []
        raise MissingRun(MISSING, *lines, FIGURE1)
    cheap = [rival for rival in rivals if rival[2] <= rival[3]] or [min(rivals, key=lambda rival: rival[2])]
    changes = []
    for row, seeds, theirs, ours in cheap:
        scores = [score for runs in seeds.values() for score in runs]
        try:
            # The rival minus CHAI, the mean of the rival's seeds.
            pairs = [
                compare_seeds(mine[task].samples, {one.replicate[0]: one.samples for one in runs}, mine[task].metric)
                for task, runs in seeds.items()
            ]
        except Unpaired as error:
            source.passed += [PassedOver(score.run, str(error)) for score in scores]
            continue
        changes.append((-mean_over_tasks(pairs).points, row, scores, 100 * theirs / ours))
    if not changes:
        raise MissingRun(MISSING, f"{FIGURE1} force=true")
    points, row, scores, share = min(changes, key=lambda one: one[0].value)
    detail = f"{row_name(row.method, row.settings)}, {share:.1f} % of CHAI's operations"
    runs = [score.run for score in (*mine.values(), *scores)]
    certainty = f"paired score intervals over {sum(score.n for score in mine.values()):,} items"
    # A method's best point is known once all of them are run.
    run = [row.settings for row, *_ in rivals]
    missing = [one for one in _points(whole, method) if not any(one.items() <= settings.items() for settings in run)]
    return Ours(points, certainty, runs, detail, label(method), (FIGURE1,) if missing else ())


def _points(table: Table, method: str) -> list[dict[str, Any]]:
    """Return the settings of a method's points in Figure 1, by both readings of its numbers of heads."""
    heads = int(defaults(f"model/{table.model}")["architecture"]["num_attention_heads"])
    kept = paper.figure1_numbers(method, heads)
    counts = [*kept, *(paper.clusters_left(n, heads) for n in kept)]
    rows = [row.paper.settings for row in table.rows if row.paper and row.method == method]
    return [*({"clusters": k} for k in counts), *rows]


def _operations(run: Run) -> int | None:
    flops = run.result.get("flops")
    return int(flops["method"]) if isinstance(flops, dict) and fig1.has_operations(flops) else None
