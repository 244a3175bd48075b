"""When a number of the paper counts as reproduced: our 95 % interval against it, with a stated tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "not reproduced", "undecided", "not run yet"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced", "undecided", "not run yet")
Bound = Literal["equals", "at most", "at least", "reaches"]
BOUNDS: tuple[Bound, ...] = ("equals", "at most", "at least", "reaches")

CELL_TOLERANCE = 0.5  # points, of a cell of the paper's tables: rounding, and other versions of everything
WIDEST = 6.0  # times the tolerance, from the middle of an interval to its end: a wider one agrees with too much

RULES = (
    "A number (=) is reproduced if the paper's lies within our 95 % interval, widened by the tolerance on both sides, "
    f"and not if it lies outside. An interval that reaches further than {WIDEST:g} times the tolerance from its middle "
    "decides nothing in the paper's favour: undecided.",
    "A limit (at most, at least, up to) is reproduced if the whole interval keeps it, give or take the tolerance, and "
    'not if the whole interval breaks it. An interval with an end on either side is undecided. "Up to" is '
    "reproduced if we reach it.",
    "Not reproduced means: not found under these conditions, which stand beside the number.",
    f"Cells of the tables are numbers with a tolerance of {CELL_TOLERANCE:g} points. Of a limit over several models, "
    "one that breaks it is enough; to keep it takes all of them.",
)


@dataclass(frozen=True)
class Interval:
    """A measured number.

    Attributes:
        value: the estimate.
        low: lower end of its 95 % interval; the value itself where it is exact.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """A number without uncertainty, or of unknown uncertainty."""
        return cls(value, value, value)


def judge(ours: Interval | None, bound: Bound, paper: float, tolerance: float) -> Verdict:
    """The verdict by :data:`RULES`.

    Args:
        ours: ``None``: not measured.
        bound: how the paper means its number.
        paper: that number.
        tolerance: in its unit.
    """
    if ours is None:
        return "not run yet"
    slack = tolerance + 1e-9 * max(1.0, abs(paper))  # what rounds to the border is on it
    if bound == "equals":
        if not ours.low - slack <= paper <= ours.high + slack:
            return "not reproduced"
        return "undecided" if (ours.high - ours.low) / 2 > WIDEST * slack else "reproduced"
    if bound == "at most":
        keeps, breaks = ours.high <= paper + slack, ours.low > paper + slack
    else:
        keeps, breaks = ours.low >= paper - slack, ours.high < paper - slack
    return "reproduced" if keeps else "not reproduced" if breaks else "undecided"
