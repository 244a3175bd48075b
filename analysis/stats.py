"""Compare a method with multi-head attention on the same items, and our numbers with the paper's.

Both runs answer the same questions, so differences are taken item by item (a paired comparison). Their uncertainty
comes from the items on which the runs differ alone, and is much smaller than that of either score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import pandas as pd
from scipy.stats import binomtest

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0

Verdict = Literal["reproduced", "not reproduced", "undecided", "not run yet"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Bound = Literal["equals", "at most", "at least", "reaches"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)
CELL_TOLERANCE = 0.5  # points, for cells of the paper's tables: rounding, and other versions of everything
WIDEST = 6.0  # largest half-width of an interval that supports the paper, in tolerances

RULES = (
    "A number (=) is reproduced if the paper's lies within our 95 % interval, widened by the tolerance on both sides, "
    f"and not if it lies outside. An interval that reaches further than {WIDEST:g} times the tolerance from its middle "
    "decides nothing in the paper's favour: undecided.",
    "A limit (at most, at least, up to) is reproduced if the whole interval keeps it, give or take the tolerance, and "
    'not if the whole interval breaks it. An interval with an end on either side is undecided. "Up to" is '
    "reproduced if we reach it.",
    "Not reproduced means: not found under these conditions, which are shown beside the number.",
    f"Cells of the tables are numbers with a tolerance of {CELL_TOLERANCE:g} points. Of a limit over several models, "
    "one that breaks it is enough; all of them must keep it.",
)


class Unpaired(ValueError):
    """Raised when two runs cannot be compared item by item; the message is the reason."""


@dataclass(frozen=True)
class Interval:
    """A measured number with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """Return a number without uncertainty, or of unknown uncertainty."""
        return cls(value, value, value)

    def __neg__(self) -> Interval:
        return Interval(-self.value, -self.high, -self.low)


@dataclass(frozen=True)
class Comparison:
    """A method's score minus that of multi-head attention, as fractions of one."""

    n: int  # items compared
    difference: float  # of the means
    low: float  # ends of the difference's 95 % interval
    high: float
    p: float  # of McNemar's test, two-sided and exact
    lost: int  # items right under multi-head attention and wrong under the method
    gained: int  # items wrong under multi-head attention and right under the method
    draws: np.ndarray = field(repr=False, compare=False)  # bootstrap differences, [RESAMPLES]

    @property
    def points(self) -> Interval:
        """The difference in percentage points."""
        return Interval(100 * self.difference, 100 * self.low, 100 * self.high)


def compare(baseline: pd.DataFrame, other: pd.DataFrame, metric: str) -> Comparison:
    """Compare two runs' items, paired by ``doc_id``.

    With few flipped items (about ten) the interval is narrower than it should be, and with none it has no width;
    McNemar's p is exact for any number.

    The metric is 1 for a right answer and 0 for a wrong one; ``baseline`` is of multi-head attention.

    Raises:
        Unpaired: the items differ, an item occurs twice, or an outcome is neither 0 nor 1.
    """
    for name, samples in (("MHA", baseline), ("the method", other)):
        missing = [column for column in ("doc_id", "doc_hash", metric) if column not in samples]
        if missing:
            raise Unpaired(f"the samples of {name} have no {', '.join(missing)}")
        if samples.doc_id.duplicated().any():
            raise Unpaired(f"item {samples.doc_id[samples.doc_id.duplicated()].iloc[0]} occurs twice under {name}")
        if not samples[metric].isin([0, 1]).all():
            raise Unpaired(f"{metric} under {name} is not 0 or 1 for every item")

    # Pair the items; every item must be in both runs, with the same content.
    both = baseline.merge(other, on="doc_id", suffixes=("", "_other"))
    if not len(both) == len(baseline) == len(other):
        raise Unpaired(
            f"not the same items: {len(baseline)} under MHA, {len(other)} under the method, {len(both)} both"
        )
    if both.empty:
        raise Unpaired("no items")
    differing = both.doc_hash != both.doc_hash_other
    if differing.any():
        example = both.doc_id[differing].iloc[0]
        raise Unpaired(f"{differing.sum()} of {len(both)} items differ in content (doc_hash), item {example} first")

    # Count the items that flip, and resample.
    before, after = both[metric], both[f"{metric}_other"]
    lost, gained, n = int((before > after).sum()), int((before < after).sum()), len(both)
    draws = resample(lost, gained, n)
    return Comparison(n, (gained - lost) / n, *interval(draws), mcnemar(lost, gained), lost, gained, draws)


def resample(lost: int, gained: int, n: int) -> np.ndarray:
    """Return differences of the means ``[RESAMPLES]``, of ``n`` items drawn with replacement."""
    # Items of equal difference are interchangeable: draw one multinomial number for each instead of n indices.
    shares = np.array([lost, n - lost - gained, gained]) / n
    counts = np.random.default_rng(SEED).multinomial(n, shares, size=RESAMPLES)
    return counts @ np.array([-1.0, 0.0, 1.0]) / n


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Return the percentiles that enclose :data:`LEVEL` of the draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """Return p of McNemar's test: under its null hypothesis a flipped item is lost with probability one half."""
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def mean_over_tasks(comparisons: Sequence[Comparison]) -> Comparison:
    """Return the mean of several tasks' differences, each task with the same weight.

    Tasks are resampled independently. The flips, and so McNemar's p, are those of all items together.
    """
    # All tasks were drawn with the same seed: shuffle the draws, so that they are independent.
    generator = np.random.default_rng(SEED)
    draws = np.mean([generator.permutation(one.draws) for one in comparisons], axis=0)
    lost, gained = sum(one.lost for one in comparisons), sum(one.gained for one in comparisons)
    difference = float(np.mean([one.difference for one in comparisons]))
    n = sum(one.n for one in comparisons)
    return Comparison(n, difference, *interval(draws), mcnemar(lost, gained), lost, gained, draws)


def judge(ours: Interval | None, bound: Bound, paper: float, tolerance: float) -> Verdict:
    """Return the verdict on our number by :data:`RULES`; the tolerance is in its unit."""
    if ours is None:
        return "not run yet"
    slack = tolerance + 1e-9 * max(1.0, abs(paper))  # rounding errors at the border do not count
    if bound == "equals":
        if not ours.low - slack <= paper <= ours.high + slack:
            return "not reproduced"
        return "undecided" if (ours.high - ours.low) / 2 > WIDEST * slack else "reproduced"
    if bound == "at most":
        keeps, breaks = ours.high <= paper + slack, ours.low > paper + slack
    else:
        keeps, breaks = ours.low >= paper - slack, ours.high < paper - slack
    return "reproduced" if keeps else "not reproduced" if breaks else "undecided"
