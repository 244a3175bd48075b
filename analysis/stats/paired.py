"""Paired comparisons: of two runs, of several seeds of a method, and the mean of several tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t

from analysis.stats import score_interval
from analysis.stats.intervals import EQUAL_LEVEL, LEVEL, Interval, quantile

DRAWS = 50_000  # random signs of the permutation test; as many combinations are enumerated instead
SEED = 0  # of the drawn signs; and of runs without one
FARTHEST = 8.0  # standard errors; beyond, p is given as that of this distance


class Unpaired(ValueError):
    """Raised when two runs cannot be compared item by item; the message is the reason."""


@dataclass(frozen=True)
class Flips:
    """Flipped items of a task. Of several seeds: as many as a single run with the same uncertainty would have."""

    n: float
    lost: float
    gained: float

    @property
    def difference(self) -> float:
        """Difference of the shares of right items."""
        return (self.gained - self.lost) / self.n


@dataclass(frozen=True)
class Comparison:
    """A method's score minus that of multi-head attention, as fractions of one.

    The uncertainty has two parts: other items, by the score interval of each task; and other seeds, if the method was
    run with several, by Student's t of the differences of the seeds.
    """

    n: int  # items compared
    lost: float  # items right under multi-head attention and wrong under the method; mean over the seeds
    gained: float  # items wrong under multi-head attention and right under the method; mean over the seeds
    tasks: tuple[Flips, ...]  # one for each task, which all weigh the same
    by_seed: Mapping[int, float]  # difference of each seed; empty if the seeds of a mean's tasks are not the same
    seed_error: float  # standard error of the difference from the seeds; 0 for a single one
    seed_dof: int  # its degrees of freedom

    @property
    def difference(self) -> float:
        """The difference of the means."""
        return float(np.mean([task.difference for task in self.tasks]))

    @property
    def low(self) -> float:
        """Lower end of the difference's 95 % interval."""
        return self._shown[0]

    @property
    def high(self) -> float:
        """Upper end of the difference's 95 % interval."""
        return self._shown[1]

    @cached_property
    def _shown(self) -> tuple[float, float]:
        return self.ends(LEVEL)

    @cached_property
    def p(self) -> float:
        """Two-sided p of no difference: of McNemar's test for one task, of :func:`sign_flip` for a mean.

        Of several seeds it is found from the interval: that of the level at which the interval ends at 0.
        """
        if len(self.by_seed) == 1:
            return mcnemar(int(self.lost), int(self.gained)) if len(self.tasks) == 1 else sign_flip(self.tasks)

        def beyond(z: float) -> float:
            low, high = self._ends_at(z)
            return max(low, -high)

        return 2 * float(norm.sf(_crossing(beyond)))

    @property
    def points(self) -> Interval:
        """The difference in percentage points."""
        low, high = self.ends(EQUAL_LEVEL)
        return Interval(100 * self.difference, 100 * self.low, 100 * self.high, (100 * low, 100 * high))

    @property
    def sd(self) -> float | None:
        """Standard deviation of the difference over the seeds; ``None`` for a single one."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if len(self.by_seed) > 1 else None

    def ends(self, level: float) -> tuple[float, float]:
        """Return both ends of the difference's interval of any level."""
        return self._ends_at(quantile(level))

    def _ends_at(self, z: float) -> tuple[float, float]:
        """Return both ends; the level is given as the half-width ``z`` of a standard normal variable's interval."""
        low, high = score_interval.ends(*np.array([[task.lost, task.gained, task.n] for task in self.tasks]).T, z)
        differences = np.array([task.difference for task in self.tasks])
        seeds = float(t.isf(norm.sf(z), self.seed_dof)) * self.seed_error if self.seed_error > 0 else 0.0
        left, right = (np.linalg.norm([*(end - differences) / len(self.tasks), seeds]) for end in (low, high))
        return self.difference - float(left), self.difference + float(right)

    def p_equal(self, margin: float) -> float:
        """Return p of equivalence: of two one-sided tests of a difference beyond the margin, the greater p.

        It is below 5 % if the 90 % interval lies within the margin on both sides. The margin is a fraction of one.
        """
        if abs(self.difference) >= margin:
            return 1.0
        if len(self.tasks) == 1 and self.seed_error == 0:
            one = self.tasks[0]
            below, above = score_interval.statistic(one.lost, one.gained, one.n, np.array([-margin, margin]))
            return float(norm.sf(min(below, -above)))

        def room(z: float) -> float:
            low, high = self._ends_at(z)
            return min(margin - high, low + margin)

        return float(norm.sf(_crossing(room)))


def compare(baseline: pd.DataFrame, other: pd.DataFrame, metric: str) -> Comparison:
    """Compare two runs' items, paired by ``doc_id``.

    The interval is Tango's score interval; p is of McNemar's test, exact.

    The metric is 1 for a right answer and 0 for a wrong one; ``baseline`` is of multi-head attention.

    Raises:
        Unpaired: the items differ, an item occurs twice, or an outcome is neither 0 nor 1.
    """
    return compare_seeds(baseline, {SEED: other}, metric)


def compare_seeds(baseline: pd.DataFrame, others: Mapping[int, pd.DataFrame], metric: str) -> Comparison:
    """Compare the mean of several runs of a method, by seed, with one run of multi-head attention.

    Raises:
        Unpaired: see :func:`compare`.
    """
    flips = np.stack([_flips(baseline, other, metric) for other in others.values()])  # [seeds, items]
    return from_flips(flips, list(others))


def from_flips(flips: np.ndarray, seeds: Sequence[int]) -> Comparison:
    """Return the comparison of the seeds' runs, given 1 for an item gained, -1 for one lost, else 0: [seeds, items]."""
    n = flips.shape[1]
    by_seed = {seed: float(row.mean()) for seed, row in zip(seeds, flips, strict=True)}
    lost, gained = (int((flips == sign).sum()) for sign in (-1, 1))
    if len(seeds) == 1:
        return _comparison([Flips(n, lost, gained)], by_seed, lost, gained, n)
    return _comparison([_effective(flips)], by_seed, lost / len(seeds), gained / len(seeds), n)


def from_counts(lost: int, gained: int, n: int) -> Comparison:
    """Return the comparison of two runs of which only the numbers of flipped items are known."""
    return _comparison([Flips(n, lost, gained)], {SEED: (gained - lost) / n}, lost, gained, n)


def mean_over_tasks(comparisons: Sequence[Comparison]) -> Comparison:
    """Return the mean of several tasks' differences, each task with the same weight.

    The intervals of independent tasks are combined by the method of variance estimates recovery: the distance of an end
    from the mean is the root of the sum of the tasks' squared distances (G. Zou and A. Donner, Statistics in Medicine
    27, 2008). p is of a permutation test of the mean: :func:`sign_flip`. With several seeds, it is found from the
    interval; seeds count as the same choice in every task.
    """
    tasks = [task for one in comparisons for task in one.tasks]
    lost, gained = sum(one.lost for one in comparisons), sum(one.gained for one in comparisons)
    n, seeds = sum(one.n for one in comparisons), [set(one.by_seed) for one in comparisons]
    if all(other == seeds[0] for other in seeds):
        by_seed = {seed: float(np.mean([one.by_seed[seed] for one in comparisons])) for seed in comparisons[0].by_seed}
        return _comparison(tasks, by_seed, lost, gained, n)
    # The tasks have different seeds: the errors may be as alike as can be, so that they do not cancel out.
    error = float(np.mean([one.seed_error for one in comparisons]))
    dof = min(one.seed_dof for one in comparisons if one.seed_error > 0) if error else 0
    return Comparison(n, lost, gained, tuple(tasks), {}, error, dof)


def _flips(baseline: pd.DataFrame, other: pd.DataFrame, metric: str) -> np.ndarray:
    """Return for each item 1 if the method gains it, -1 if it loses it, else 0."""
    columns = ["doc_id", "doc_hash", metric]
    for name, samples in (("MHA", baseline), ("the method", other)):
        missing = [column for column in columns if column not in samples]
        if missing:
            raise Unpaired(f"the samples of {name} have no {', '.join(missing)}")
        if samples.doc_id.duplicated().any():
            raise Unpaired(f"item {samples.doc_id[samples.doc_id.duplicated()].iloc[0]} occurs twice under {name}")
        if not samples[metric].isin([0, 1]).all():
            raise Unpaired(f"{metric} under {name} is not 0 or 1 for every item")

    # Pair the items; every item must be in both runs, with the same content.
    if np.array_equal(baseline.doc_id, other.doc_id):  # as a rule: no merge is needed
        hashes, values = other.doc_hash.to_numpy(), other[metric].to_numpy()
        both = baseline[columns].assign(**{"doc_hash_other": hashes, f"{metric}_other": values})
    else:
        both = baseline[columns].merge(other[columns], on="doc_id", suffixes=("", "_other"))
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
    return (both[f"{metric}_other"] - both[metric]).to_numpy(dtype=float)


def _effective(flips: np.ndarray) -> Flips:
    """Return the flips ``[seeds, items]`` as those of one run with the uncertainty of the seeds' mean.

    The mean of S seeds varies from item to item less than one run does, between S times less (if the seeds flip items
    independently) and not less (if they flip the same): the design effect, by which all counts are divided.
    """
    n, lost, gained = flips.shape[1], float((flips < 0).sum(1).mean()), float((flips > 0).sum(1).mean())
    of_one_run = (lost + gained) / n - ((gained - lost) / n) ** 2
    effect = float(np.clip(flips.mean(0).var() / of_one_run, 1 / len(flips), 1)) if of_one_run > 0 else 1.0
    return Flips(n / effect, lost / effect, gained / effect)


def _comparison(tasks: Sequence[Flips], by_seed: Mapping[int, float], lost: float, gained: float, n: int) -> Comparison:
    spread = list(by_seed.values())
    error = float(np.std(spread, ddof=1) / math.sqrt(len(spread))) if len(spread) > 1 else 0.0
    return Comparison(n, lost, gained, tuple(tasks), by_seed, error, len(spread) - 1)


def _crossing(margin: Callable[[float], float]) -> float:
    """Return the half-width ``z`` at which a falling function of it is 0, at most :data:`FARTHEST`."""
    if margin(1e-6) <= 0:
        return 0.0
    return FARTHEST if margin(FARTHEST) > 0 else float(brentq(margin, 1e-6, FARTHEST, xtol=1e-4))


def mcnemar(lost: int, gained: int) -> float:
    """Return p of McNemar's test: under its null hypothesis a flipped item is lost with probability one half."""
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def sign_flip(tasks: Sequence[Flips]) -> float:
    """Return p of a permutation test of the mean over tasks of ``(gained - lost) / n``.

    Under its null hypothesis each flipped item is lost or gained with probability one half. All numbers of gained
    items are enumerated if they have at most :data:`DRAWS` combinations, else as many are drawn.
    """
    return _sign_flip(tuple(tasks), DRAWS)


@lru_cache(maxsize=4096)
def _sign_flip(tasks: tuple[Flips, ...], draws: int) -> float:
    """Return p of :func:`sign_flip`; kept, since tables and figures show the same comparisons."""
    weights = np.array([1 / task.n for task in tasks])
    flipped = np.array([round(task.lost + task.gained) for task in tasks])
    observed = abs(sum(task.difference for task in tasks))
    if math.prod(int(count) + 1 for count in flipped) <= draws:
        sums, chances = np.zeros(1), np.ones(1)
        for weight, count in zip(weights, flipped, strict=True):
            gained = np.arange(count + 1)
            sums = np.add.outer(sums, weight * (2 * gained - count)).ravel()
            coins = np.array([math.comb(int(count), int(k)) for k in gained], dtype=float) / 2.0 ** int(count)
            chances = np.multiply.outer(chances, coins).ravel()
        return float(min(1.0, chances[np.abs(sums) >= observed - 1e-12].sum()))
    gained = np.random.default_rng(SEED).binomial(flipped, 0.5, size=(draws, len(tasks)))
    extreme = np.abs((2 * gained - flipped) @ weights) >= observed - 1e-12
    return float((1 + extreme.sum()) / (1 + draws))
