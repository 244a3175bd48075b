"""A method against multi-head attention on the same items: what changed, how surely, and which answers flipped.

Both runs answer the same questions, so the comparison is made within each item. Its uncertainty is that of the items on
which the two differ alone, which is much smaller than that of either score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import binomtest

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0


class Unpaired(ValueError):
    """Two runs that can't be compared item by item; the message says why."""


@dataclass(frozen=True)
class Comparison:
    """A method's score less that of multi-head attention.

    Attributes:
        n: items compared.
        difference: of the means, as a fraction of one.
        low: lower end of the 95 % interval of the difference.
        high: its upper end.
        p: McNemar's, two-sided and exact: how likely flips as lopsided as these are if either way is as likely.
        lost: answers right under multi-head attention and wrong under the method.
        gained: answers the other way round.
        draws: the bootstrap's differences, for a mean over tasks.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    lost: int
    gained: int
    draws: np.ndarray = field(repr=False, compare=False)


def compare(baseline: pd.DataFrame, other: pd.DataFrame, metric: str) -> Comparison:
    """Compare two runs' items, paired by ``doc_id``.

    With few flipped answers (ten, say) the interval is narrower than it should be, and with none it has no width;
    McNemar's p is exact for any number.

    Args:
        baseline: ``samples.parquet`` of multi-head attention.
        other: that of the method.
        metric: the column to compare, one where an answer is right and zero where it is wrong.

    Raises:
        Unpaired: items that aren't the same, that occur twice, or outcomes other than right and wrong.
    """
    lost, gained, n = flips(baseline, other, metric)
    draws = resample([-1.0, 0.0, 1.0], [lost, n - lost - gained, gained])
    low, high = interval(draws)
    return Comparison(n, (gained - lost) / n, low, high, mcnemar(lost, gained), lost, gained, draws)


def flips(baseline: pd.DataFrame, other: pd.DataFrame, metric: str) -> tuple[int, int, int]:
    """Answers lost, answers gained, and items; for arguments and errors see :func:`compare`."""
    for name, samples in (("MHA", baseline), ("the method", other)):
        lacking = [column for column in ("doc_id", "doc_hash", metric) if column not in samples]
        if lacking:
            raise Unpaired(f"the samples of {name} have no {', '.join(lacking)}")
        if samples.doc_id.duplicated().any():
            raise Unpaired(f"item {samples.doc_id[samples.doc_id.duplicated()].iloc[0]} occurs twice under {name}")
        if not samples[metric].isin([0, 1]).all():
            raise Unpaired(f"{metric} under {name} isn't 0 or 1 for each item")
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
        raise Unpaired(f"{differing.sum()} of {len(both)} items have another content (doc_hash), item {example} first")
    before, after = both[metric], both[f"{metric}_other"]
    return int((before > after).sum()), int((before < after).sum()), len(both)


def resample(values: Sequence[float], counts: Sequence[int]) -> np.ndarray:
    """Means of items drawn with replacement, ``[RESAMPLES]``.

    Items of equal value are interchangeable, so drawing n of them is drawing how many there are of each value: one
    multinomial number for each value, instead of n indices.

    Args:
        values: that an item's difference can have.
        counts: items of each.
    """
    n = sum(counts)
    drawn = np.random.default_rng(SEED).multinomial(n, np.asarray(counts) / n, size=RESAMPLES)
    return drawn @ np.asarray(values) / n


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The percentiles that hold :data:`LEVEL` of the draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's test: under its null hypothesis each flipped answer is lost or gained with probability one half."""
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def mean_over_tasks(comparisons: Sequence[Comparison]) -> Comparison:
    """The mean of several tasks' differences, each task counting the same.

    Tasks are resampled independently. The flips, and so McNemar's p, are those of all items together.
    """
    generator = np.random.default_rng(SEED)
    # The tasks' draws come from one seed: shuffled, their order has nothing in common.
    draws = np.mean([generator.permutation(one.draws) for one in comparisons], axis=0)
    low, high = interval(draws)
    lost, gained = sum(one.lost for one in comparisons), sum(one.gained for one in comparisons)
    difference = float(np.mean([one.difference for one in comparisons]))
    n = sum(one.n for one in comparisons)
    return Comparison(n, difference, low, high, mcnemar(lost, gained), lost, gained, draws)
