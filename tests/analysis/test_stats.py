"""Paired statistics against closed formulas and slow loops."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import stats
from analysis.stats import Unpaired, compare, mcnemar, mean_over_tasks


def samples(outcomes, metric="acc", hashes=None, ids=None):
    ids = list(range(len(outcomes))) if ids is None else ids
    hashes = [f"hash {i}" for i in ids] if hashes is None else hashes
    return pd.DataFrame({"doc_id": ids, "doc_hash": hashes, metric: [float(value) for value in outcomes]})


def pair(both_right, lost, gained, both_wrong):
    """Samples of MHA and of a method with so many items of each kind."""
    before = [1] * (both_right + lost) + [0] * (gained + both_wrong)
    after = [1] * both_right + [0] * lost + [1] * gained + [0] * both_wrong
    return samples(before), samples(after)


def test_counts_difference_and_interval_of_known_pairs():
    result = compare(*pair(600, 80, 30, 290), "acc")
    assert (result.n, result.lost, result.gained) == (1000, 80, 30)
    assert result.difference == pytest.approx(-0.05)
    assert (result.low, result.high) == (pytest.approx(-0.07, abs=0.002), pytest.approx(-0.03, abs=0.002))
    assert result.p == pytest.approx(2 * sum(math.comb(110, i) for i in range(31)) / 2**110)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2000), st.integers(30, 400), st.integers(30, 400), st.integers(0, 2000))
def test_the_bootstrap_agrees_with_the_analytic_interval(both_right, lost, gained, both_wrong):
    """Var(difference) = (b + c - (b - c)^2 / n) / n^2; b and c are large enough for the normal approximation."""
    result = compare(*pair(both_right, lost, gained, both_wrong), "acc")
    n = both_right + lost + gained + both_wrong
    spread = math.sqrt(lost + gained - (lost - gained) ** 2 / n) / n
    assert result.difference == pytest.approx((gained - lost) / n)
    assert result.low == pytest.approx(result.difference - 1.96 * spread, abs=0.12 * spread + 1 / n)
    assert result.high == pytest.approx(result.difference + 1.96 * spread, abs=0.12 * spread + 1 / n)


def test_the_bootstrap_agrees_with_drawing_items_one_by_one():
    before, after = pair(20, 9, 3, 8)
    differences = (after.acc - before.acc).to_numpy()
    generator = np.random.default_rng(7)
    slow = np.array([generator.choice(differences, len(differences)).mean() for _ in range(4000)])
    fast = compare(before, after, "acc").draws
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.006)
    assert fast.std() == pytest.approx(slow.std(), rel=0.05)
    assert np.quantile(fast, 0.1) == pytest.approx(np.quantile(slow, 0.1), abs=0.026)  # one item of 40 is 0.025


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_by_hand(lost, gained):
    flipped = lost + gained
    tail = sum(math.comb(flipped, i) for i in range(min(lost, gained) + 1)) / 2**flipped
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_of_many_flips_is_near_its_chi_square():
    lost, gained = 1200, 1100
    chi = (abs(lost - gained) - 1) / math.sqrt(lost + gained)
    assert mcnemar(lost, gained) == pytest.approx(math.erfc(chi / math.sqrt(2)), rel=0.01)


def test_the_same_answers_differ_by_nothing():
    result = compare(*pair(5, 0, 0, 5), "acc")
    assert (result.difference, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_order_does_not_matter_and_the_same_data_give_the_same_interval():
    before, after = pair(30, 7, 5, 20)
    shuffled = after.sample(frac=1, random_state=3)
    first, second = compare(before, after, "acc"), compare(before, shuffled, "acc")
    assert first == second
    assert (first.draws == second.draws).all()


def test_the_metric_that_is_asked_for_counts():
    before, after = samples([1, 1, 1, 0]), samples([1, 1, 1, 0])
    before["acc_norm"], after["acc_norm"] = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]
    assert compare(before, after, "acc").difference == 0
    assert compare(before, after, "acc_norm").difference == -0.5


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (samples([1, 0, 1]), samples([1, 0]), "not the same items: 3 under MHA, 2 under the method, 2 both"),
        (samples([1, 0]), samples([1, 0], ids=[0, 2]), "not the same items: 2 under MHA, 2 under the method, 1 both"),
        (samples([1, 0]), samples([1, 0], hashes=["hash 0", "x"]), "1 of 2 items differ in content .* item 1 first"),
        (samples([1, 0]), samples([1, 0], ids=[1, 1]), "item 1 occurs twice under the method"),
        (samples([1, 0]).drop(columns="doc_hash"), samples([1, 0]), "the samples of MHA have no doc_hash"),
        (samples([1, 0]), samples([1, 0], "acc_norm"), "the samples of the method have no acc"),
        (samples([1, 0]), samples([1, math.nan]), "acc under the method is not 0 or 1"),
        (samples([1, 0.5]), samples([1, 0]), "acc under MHA is not 0 or 1"),
        (samples([]), samples([]), "no items"),
    ],
)
def test_what_is_no_pair_is_refused_with_the_reason(before, after, reason):
    with pytest.raises(Unpaired, match=reason):
        compare(before, after, "acc")


def test_the_mean_weighs_tasks_alike_and_draws_them_independently():
    small, large = compare(*pair(20, 12, 2, 16), "acc"), compare(*pair(900, 100, 60, 940), "acc")
    result = mean_over_tasks([small, large, small])
    assert result.difference == pytest.approx((2 * small.difference + large.difference) / 3)
    assert (result.n, result.lost, result.gained) == (2100, 124, 64)
    assert result.p == mcnemar(124, 64)
    variance = (2 * small.draws.var() + large.draws.var()) / 9
    assert result.draws.var() == pytest.approx(variance, rel=0.05)
    assert result.low < result.difference < result.high
    assert len(result.draws) == stats.RESAMPLES
