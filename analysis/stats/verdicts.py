"""Judge our numbers against the paper's."""

from __future__ import annotations

from typing import Literal, get_args

from analysis.stats.intervals import Interval

Verdict = Literal["reproduced", "not reproduced", "undecided", "not run yet"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Bound = Literal["equals", "at most", "at least", "reaches"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)
#: Points within which two scores are called equal. Chosen by power (docs/reproducing.md): on the smallest task, of
#: 1,172 items, a rerun that flips one item in fifty is found to be equal in 99 % of cases; within 1 point, in half.
MARGIN = 2.0

RULES = (
    "A number (=) is reproduced if ours is shown to be equal to it: two one-sided tests at the 5 % level exclude a "
    "difference of more than the tolerance, which means that our 90 % interval lies within the tolerance of the "
    "paper's number. It is not reproduced if our whole 95 % interval lies further away. Otherwise it is undecided: the "
    "measurement is too coarse to tell.",
    "A limit (at most, at least, up to) is reproduced if the whole 95 % interval keeps it, give or take the tolerance, "
    'and not if the whole interval breaks it. An interval with an end on either side is undecided. "Up to" is '
    "reproduced if we reach it.",
    "Not reproduced means: not found under these conditions, which are shown beside the number.",
    f"Cells of the tables are numbers with a tolerance of {MARGIN:g} points. Of a limit over several models, "
    "one that breaks it is enough; all of them must keep it.",
)


def judge(ours: Interval | None, bound: Bound, paper: float, tolerance: float) -> Verdict:
    """Return the verdict on our number by :data:`RULES`; the tolerance is in its unit."""
    if ours is None:
        return "not run yet"
    slack = tolerance + 1e-9 * max(1.0, abs(paper))  # rounding errors at the border do not count
    if bound == "equals":
        low, high = ours.inner
        keeps = paper - slack <= low and high <= paper + slack
        breaks = ours.low > paper + slack or ours.high < paper - slack
    elif bound == "at most":
        keeps, breaks = ours.high <= paper + slack, ours.low > paper + slack
    else:
        keeps, breaks = ours.low >= paper - slack, ours.high < paper - slack
    return "reproduced" if keeps else "not reproduced" if breaks else "undecided"
