"""Known answers of the embedded model: its groups of heads were planted, so the correct results are known."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.plotting.style import label
from analysis.results.benchmarks import chai_memory
from analysis.results.files import SkippedRun
from analysis.results.profiles import PROFILE, best_profile
from analysis.results.runs import MissingRun, Results, Run
from analysis.results.scores import read_config
from analysis.stats import LEVEL, Comparison
from analysis.tables.cells import Table
from analysis.tables.layout import signed

MOST_LOST = 1.0  # points, mean of the tasks: heads of a planted group attend almost alike
LEAST_AGREEMENT = 0.9  # adjusted Rand index; 1 is the same membership
MEMORY_COMMAND = "python run.py experiment=memory model=tiny"
SCORES_COMMAND = "python run.py -m method=mha,chai,random"


@dataclass(frozen=True)
class Check:
    """A known answer and ours."""

    statement: str
    known: str
    ours: str = ""  # empty: not measured
    certainty: str = ""  # what the interval accounts for, or why there is none
    state: str = "not run yet"  # or holds, fails, undecided
    command: str = ""  # measures it, if it is not measured
    runs: tuple[Run, ...] = ()  # source of our answer


def checks(results: Results, table: Table) -> list[Check]:
    """Return all checks, of the embedded model's results and table."""
    return [_counts(results), _agreement(results), _bytes(results), _loss(table), _control(table)]


def _holds(condition: bool) -> str:
    return "holds" if condition else "fails"


def _counts(results: Results) -> Check:
    statement = "The offline phase finds as many clusters in each layer as groups were planted"
    try:
        run = best_profile(results).run
        planted = read_config(run.folder)["model"].get("clusters")
    except (MissingRun, SkippedRun):
        return Check(statement, "the planted counts", command=PROFILE.small_command)
    if not isinstance(planted, list):
        return Check(statement, "the planted counts", command=f"{PROFILE.small_command} force=true")
    counts = run.result["heads_kept"]
    known, ours = (", ".join(map(str, ks)) for ks in (planted, counts))
    return Check(statement, known, ours, "exact", _holds(planted == counts), runs=(run,))


def _agreement(results: Results) -> Check:
    statement = "Membership from five tokens agrees with that from the whole text (adjusted Rand index)"
    known = f"at least {LEAST_AGREEMENT:g}; 1 is the same"
    try:
        profile = best_profile(results)
        value = float(profile["agreement"][:, profile.about["decide_tokens"] - 1].mean())
    except (MissingRun, IndexError):
        return Check(statement, known, command=PROFILE.small_command)
    certainty = f"mean over layers and {profile.samples:,} texts"
    return Check(statement, known, f"{value:.3f}", certainty, _holds(value >= LEAST_AGREEMENT), runs=(profile.run,))


def _bytes(results: Results) -> Check:
    statement = "The cache holds as many bytes as the formula gives, at every length, under MHA and CHAI"
    try:
        run = chai_memory(results)
    except MissingRun:
        return Check(statement, "the formula's bytes", command=MEMORY_COMMAND)
    rows = run.table
    wrong = int((rows.cache_bytes != rows.formula_bytes).sum())
    last = rows[(rows.method == "chai") & (rows.length == rows.length.max())].iloc[0]
    ours = f"{last.cache_bytes:,} B at {last.length:,} tokens" + (f"; {wrong} of {len(rows)} differ" if wrong else "")
    certainty = f"exact, {len(rows)} measurements"
    return Check(statement, f"{last.formula_bytes:,} B", ours, certainty, _holds(not wrong), runs=(run,))


def _loss(table: Table) -> Check:
    statement = "CHAI loses little on average: heads of a planted group attend almost alike"
    known = f"at most {MOST_LOST:g} point"
    change, runs = _mean(table, "chai")
    if change is None:
        return Check(statement, known, command=SCORES_COMMAND)
    loss = -change.points
    state = "holds" if loss.high <= MOST_LOST else "fails" if loss.low > MOST_LOST else "undecided"
    ours = f"{signed(loss.value)} [{signed(loss.low)}, {signed(loss.high)}] points lost"
    return Check(statement, known, ours, _items(change), state, runs=runs)


def _control(table: Table) -> Check:
    statement = "Combining heads at random, with the same counts, loses more than combining them by attention"
    known = "CHAI above random"
    (chai, chai_runs), (control, control_runs) = _mean(table, "chai"), _mean(table, "random")
    if chai is None or control is None:
        return Check(statement, known, command=SCORES_COMMAND)
    state = "holds" if chai.low > control.high else "fails" if chai.high < control.low else "undecided"
    words = [
        f"{label(method)} {signed(points.value)} [{signed(points.low)}, {signed(points.high)}]"
        for method, points in (("chai", chai.points), ("random", control.points))
    ]
    return Check(statement, known, f"{', '.join(words)} points", _items(chai), state, runs=chai_runs + control_runs)


def _mean(table: Table, method: str) -> tuple[Comparison | None, tuple[Run, ...]]:
    """Return the mean change of a method with the model's own counts, and its runs with MHA's."""
    row = table.row_of(method)
    if row is None or row.settings:
        return None, ()
    return row.cells[-1].change, tuple(score.run for cell in row.cells for score in cell.scores)


def _items(change: Comparison) -> str:
    return f"{100 * LEVEL:g} %, paired, over {change.n:,} items"
