"""The embedded model's known answers: its head groups were planted, so it is known what has to come out."""

from __future__ import annotations

from dataclasses import dataclass

from analysis import profiles
from analysis.figures import _look, fig11
from analysis.figures._catalogue import WITHOUT_GPU
from analysis.paired import LEVEL, Comparison
from analysis.report._measures import chai_row
from analysis.saved import LeftOut, MissingRun, Results, Run
from analysis.scores import read_config
from analysis.tables._cells import Table
from analysis.tables._layout import signed
from analysis.tables._specs import MEAN

MOST_LOST = 1.0  # points, mean of the tasks: heads of a planted group attend almost alike
LEAST_AGREEMENT = 0.9  # adjusted Rand index; 1 is the same membership
MEMORY = "python run.py experiment=memory model=tiny"
SCORES = "python run.py -m method=mha,chai,random"


@dataclass(frozen=True)
class Check:
    """A known answer and ours.

    Attributes:
        statement: what has to be.
        known: the answer.
        ours: what was measured; empty: nothing yet.
        certainty: what the interval is of, or why there is none.
        state: ``holds``, ``fails``, ``undecided``, ``not run yet``.
        command: what measures it; empty: it is there.
        runs: it is computed from.
    """

    statement: str
    known: str
    ours: str = ""
    certainty: str = ""
    state: str = "not run yet"
    command: str = ""
    runs: tuple[Run, ...] = ()


def checks(results: Results, table: Table) -> list[Check]:
    """All of them.

    Args:
        results: narrowed to the embedded model.
        table: its scores.
    """
    return [_counts(results), _agreement(results), _bytes(results), _loss(table), _control(table)]


def _counts(results: Results) -> Check:
    statement = "The offline phase finds as many clusters in each layer as groups were planted"
    try:
        run = profiles.best(results).run
        planted = read_config(run.folder)["model"].get("clusters")
    except (MissingRun, LeftOut):
        return Check(statement, "the planted counts", command=WITHOUT_GPU["profile"])
    found = run.result["heads_kept"]
    if not isinstance(planted, list):
        return Check(statement, "the planted counts", command=f"{WITHOUT_GPU['profile']} force=true")
    state = "holds" if planted == found else "fails"
    return Check(statement, _list(planted), _list(found), "exact", state, runs=(run,))


def _list(counts: list[int]) -> str:
    return ", ".join(map(str, counts))


def _agreement(results: Results) -> Check:
    statement = "Membership from five tokens agrees with that from the whole text (adjusted Rand index)"
    known = f"at least {LEAST_AGREEMENT:g}; 1 is the same"
    try:
        profile = profiles.best(results)
        decide = profile.about["decide_tokens"]
        value = float(profile["agreement"][:, decide - 1].mean())
    except (MissingRun, IndexError):
        return Check(statement, known, command=WITHOUT_GPU["profile"])
    samples = profile.about["corpus"]["samples"]
    state = "holds" if value >= LEAST_AGREEMENT else "fails"
    return Check(
        statement, known, f"{value:.3f}", f"mean over layers and {samples:,} texts", state, runs=(profile.run,)
    )


def _bytes(results: Results) -> Check:
    statement = "The cache holds as many bytes as arithmetic says, at every length, under MHA and CHAI"

    def usable(run: Run) -> bool:
        return run.method == "chai" and {"mha", "chai"} <= set(run.table.method)

    try:
        run = results.newest(fig11.EXPERIMENT, fig11.COLUMNS, fig11.FIELDS, usable)
    except MissingRun:
        return Check(statement, "the formula's bytes", command=MEMORY)
    rows = run.table
    wrong = int((rows.cache_bytes != rows.formula_bytes).sum())
    last = rows[(rows.method == "chai") & (rows.length == rows.length.max())].iloc[0]
    ours = f"{last.cache_bytes:,} B at {last.length:,} tokens" + (f"; {wrong} of {len(rows)} differ" if wrong else "")
    return Check(
        statement, f"{last.formula_bytes:,} B", ours, f"exact, {len(rows)} measurements",
        "fails" if wrong else "holds", runs=(run,),
    )  # fmt: skip


def _loss(table: Table) -> Check:
    statement = "CHAI loses little on average: heads of a planted group attend almost alike"
    known = f"at most {MOST_LOST:g} point"
    change, runs = _mean(table, "chai")
    if change is None:
        return Check(statement, known, command=SCORES)
    low, high = -100 * change.high, -100 * change.low
    state = "holds" if high <= MOST_LOST else "fails" if low > MOST_LOST else "undecided"
    ours = f"{signed(-100 * change.difference)} [{signed(low)}, {signed(high)}] points lost"
    return Check(statement, known, ours, _items(change), state, runs=runs)


def _control(table: Table) -> Check:
    statement = "Heads combined at random, at the same counts, lose more than by their attention"
    known = "CHAI above random"
    (chai, chai_runs), (control, control_runs) = _mean(table, "chai"), _mean(table, "random")
    if chai is None or control is None:
        return Check(statement, known, command=SCORES)
    state = "holds" if chai.low > control.high else "fails" if chai.high < control.low else "undecided"
    ours = (
        f"{_look.label('chai')} {signed(100 * chai.difference)} [{signed(100 * chai.low)}, {signed(100 * chai.high)}], "
        f"random {signed(100 * control.difference)} [{signed(100 * control.low)}, {signed(100 * control.high)}] points"
    )
    return Check(statement, known, ours, _items(chai), state, runs=chai_runs + control_runs)


def _mean(table: Table, method: str) -> tuple[Comparison | None, tuple[Run, ...]]:
    """The mean change of a method with the model's own counts, and its runs with MHA's."""
    row = chai_row(table, method)
    if row is None or row.settings:
        return None, ()
    cell = next(cell for cell in row.cells if cell.task == MEAN)
    runs = [score.run for cell in row.cells for score in (cell.score, cell.baseline) if score]
    return cell.change, tuple(runs)


def _items(change: Comparison) -> str:
    return f"{100 * LEVEL:g} %, paired bootstrap over {change.n:,} items"
