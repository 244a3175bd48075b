"""Paired statistics against closed formulas and slow loops."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from analysis import stats
from analysis.stats import (
    Comparison,
    Flips,
    Interval,
    Unpaired,
    compare,
    compare_seeds,
    holm,
    judge,
    mcnemar,
    mean_over_tasks,
    score_interval,
)
from analysis.stats.paired import from_counts, from_flips, sign_flip


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


# The score interval


def slow_statistic(lost, gained, n, difference):
    """The statistic with the likelihood maximized by search, instead of by formula."""

    def minus_log_likelihood(q):
        counts, shares = (lost, gained, n - lost - gained), (q, q + difference, 1 - 2 * q - difference)
        return -sum(count * math.log(share) for count, share in zip(counts, shares, strict=True) if count)

    low, high = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("lost", "gained", "n"), [(7, 3, 60), (1, 0, 40), (80, 30, 1000), (2, 9, 300), (30, 30, 90)])
def test_the_score_interval_agrees_with_a_search_of_the_likelihood(lost, gained, n):
    for z in (1.645, 1.96):
        low, high = score_interval.ends(lost, gained, n, z)
        assert slow_statistic(lost, gained, n, float(low)) == pytest.approx(z, abs=2e-3)
        assert slow_statistic(lost, gained, n, float(high)) == pytest.approx(-z, abs=2e-3)
    for difference in (-0.3, -0.05, 0.02, 0.2):
        expected = slow_statistic(lost, gained, n, difference)
        assert score_interval.statistic(lost, gained, n, difference) == pytest.approx(expected, rel=1e-3)


def test_without_flips_the_interval_has_the_width_of_its_formula():
    result, z = from_counts(0, 0, 500), 1.959964
    assert (result.low, result.high) == (pytest.approx(-(z**2) / (500 + z**2)), pytest.approx(z**2 / (500 + z**2)))
    assert result.p == 1 and result.difference == 0


@pytest.mark.parametrize(
    ("n", "lost", "gained"),
    [
        (200, 0.01, 0.01), (200, 0.05, 0.02), (1838, 0.005, 0.005), (1838, 0.055, 0.025), (1172, 0.002, 0.001),
        (50, 0.1, 0.02),
    ],
)  # fmt: skip
def test_the_interval_covers_the_true_difference_as_often_as_it_says(n, lost, gained):
    """Also where few items flip (2 to 4 of all), where the percentiles of a bootstrap are too narrow."""
    draws = np.random.default_rng(5).multinomial(n, [lost, gained, 1 - lost - gained], size=8000)
    for level, z in ((0.95, 1.959964), (0.90, 1.644854)):
        low, high = score_interval.ends(draws[:, 0], draws[:, 1], n, z)
        covered = ((low <= gained - lost) & (gained - lost <= high)).mean()
        assert level - 0.015 <= covered <= level + 0.035


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2000), st.integers(30, 400), st.integers(30, 400), st.integers(0, 2000))
def test_the_interval_of_many_flips_is_the_normal_one(both_right, lost, gained, both_wrong):
    """Var(difference) = (b + c - (b - c)^2 / n) / n^2; b and c are large enough for the normal approximation."""
    n = both_right + lost + gained + both_wrong
    result = from_counts(lost, gained, n)
    spread = math.sqrt(lost + gained - (lost - gained) ** 2 / n) / n
    assert result.difference == pytest.approx((gained - lost) / n)
    assert result.low == pytest.approx(result.difference - 1.96 * spread, abs=0.15 * spread + 1 / n)
    assert result.high == pytest.approx(result.difference + 1.96 * spread, abs=0.15 * spread + 1 / n)


# The tests


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
    assert (result.difference, result.p) == (0, 1) and result.low == pytest.approx(-result.high) and result.high > 0.1


def test_order_does_not_matter_and_the_same_data_give_the_same_interval():
    before, after = pair(30, 7, 5, 20)
    shuffled = after.sample(frac=1, random_state=3)
    first, second = compare(before, after, "acc"), compare(before, shuffled, "acc")
    assert first == second and (first.low, first.high, first.p) == (second.low, second.high, second.p)


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


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_the_stepwise_procedure(p):
    """By definition: in rising order, each is compared with the level over the number of those that remain."""
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.3):
        rejected, order = set(), sorted(range(len(p)), key=p.__getitem__)
        for rank, index in enumerate(order):
            if p[index] * (len(p) - rank) >= level:
                break
            rejected.add(index)
        assert {index for index, value in enumerate(adjusted) if value < level} == rejected


def test_holm_of_known_numbers():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_equivalence_is_what_the_90_percent_interval_says():
    """Its p is below 5 % just where the interval lies within the margin; of a mean too."""
    for one in (from_counts(12, 9, 900), mean_over_tasks([from_counts(12, 9, 900), from_counts(3, 5, 400)])):
        low, high = one.ends(0.9)
        for margin in np.linspace(0.0005, 0.05, 60):
            assert (one.p_equal(margin) < 0.05) == (-margin < low and high < margin)
    assert from_counts(30, 0, 1000).p_equal(0.02) == 1


def test_a_difference_of_the_margin_is_rarely_called_equal():
    """At most 5 %: the true difference is 2 points, of 1,838 items 6 % flip."""
    draws = np.random.default_rng(3).multinomial(1838, [0.04, 0.02, 0.94], size=4000)
    one, margin = draws[:, :2].T, stats.MARGIN / 100
    below, above = (score_interval.statistic(*one, 1838, side) for side in (-margin, margin))
    assert (np.minimum(below, -above) > 1.644854).mean() <= 0.06


def test_a_permutation_test_of_the_mean_by_enumeration():
    """All signs of all flipped items, one by one."""
    tasks = [Flips(40, 3, 1), Flips(25, 4, 0)]
    weights = [1 / 40] * 4 + [1 / 25] * 4
    observed = abs((1 - 3) / 40 + (0 - 4) / 25)
    sums = [abs(sum(s * w for s, w in zip(signs, weights, strict=True))) for signs in product((-1, 1), repeat=8)]
    assert sign_flip(tasks) == pytest.approx(np.mean([value >= observed - 1e-12 for value in sums]))


def test_drawn_and_enumerated_signs_agree(monkeypatch):
    tasks = [Flips(200, 22, 9), Flips(900, 30, 25), Flips(400, 12, 10)]
    exact = sign_flip(tasks)
    monkeypatch.setattr("analysis.stats.paired.DRAWS", 20_000)
    assert sign_flip(tasks) == pytest.approx(exact, abs=0.004)
    assert sign_flip([Flips(200, 22, 9)]) == pytest.approx(mcnemar(22, 9))


# Means and seeds


def test_the_mean_weighs_tasks_alike_and_combines_independent_intervals():
    small, large = from_counts(12, 2, 50), from_counts(100, 60, 2000)
    result = mean_over_tasks([small, large, small])
    assert result.difference == pytest.approx((2 * small.difference + large.difference) / 3)
    assert (result.n, result.lost, result.gained) == (2100, 124, 64)
    assert result.p == sign_flip(result.tasks) != mcnemar(124, 64)
    below = math.hypot(*(one.difference - one.low for one in (small, large, small))) / 3
    above = math.hypot(*(one.high - one.difference for one in (small, large, small))) / 3
    assert result.low == pytest.approx(result.difference - below)
    assert result.high == pytest.approx(result.difference + above)


def test_the_mean_of_five_tasks_is_covered():
    sizes, shares = (1838, 1172, 2376), [(0.01, 0.01), (0.03, 0.02), (0.002, 0.004)]
    generator, truth = np.random.default_rng(2), np.mean([gained - lost for lost, gained in shares])
    covered = []
    for _ in range(400):
        drawn = [generator.multinomial(n, [*pair, 1 - sum(pair)])[:2] for n, pair in zip(sizes, shares, strict=True)]
        one = mean_over_tasks([from_counts(*map(int, pair), n) for pair, n in zip(drawn, sizes, strict=True)])
        covered.append(one.low <= truth <= one.high)
    assert 0.92 <= np.mean(covered) <= 0.985


def seeded(generator, n, seeds, seed_sd, item_sd):
    """A comparison with MHA, all wrong; each seed gains a tenth of the items, more or less by its own luck."""
    rates = 0.1 + seed_sd * generator.standard_normal((seeds, 1)) + item_sd * generator.choice([-1, 1], n)
    return from_flips((generator.random((seeds, n)) < rates).astype(float), range(seeds))


@pytest.mark.parametrize(("seed_sd", "item_sd"), [(0.0, 0.0), (0.03, 0.0), (0.03, 0.09), (0.0, 0.1)])
def test_with_seeds_other_seeds_and_other_items_are_covered(seed_sd, item_sd):
    generator = np.random.default_rng(11)
    drawn = [seeded(generator, 300, 5, seed_sd, item_sd) for _ in range(500)]
    covered = np.mean([one.low <= 0.1 <= one.high for one in drawn])
    assert covered >= 0.92
    # Seeds of their own matter: the interval of items alone is too narrow where they differ.
    if (seed_sd, item_sd) == (0.03, 0.0):
        alone = [mean_over_tasks([Comparison(*fields(one))]) for one in drawn]
        assert np.mean([one.low <= 0.1 <= one.high for one in alone]) < 0.85


def fields(one):
    """Of a comparison whose seeds' errors are left out."""
    return one.n, one.lost, one.gained, one.tasks, {0: one.difference}, 0.0, 0


def test_seeds_of_the_same_outcome_are_one_run():
    before, after = pair(30, 7, 5, 20)
    one, five = compare(before, after, "acc"), compare_seeds(before, dict.fromkeys(range(5), after), "acc")
    assert (five.low, five.high) == (pytest.approx(one.low), pytest.approx(one.high))
    assert five.sd == 0 and one.sd is None and (five.lost, five.gained) == (7, 5)
    assert five.p_equal(0.3) == pytest.approx(one.p_equal(0.3), abs=1e-6)


def test_the_mean_and_sd_over_seeds():
    before = samples([1] * 50 + [0] * 50)
    after = {seed: samples([1] * (50 - lost) + [0] * (50 + lost)) for seed, lost in enumerate((4, 6, 11))}
    one = compare_seeds(before, after, "acc")
    assert one.difference == pytest.approx(-0.07) and one.sd == pytest.approx(np.std([0.04, 0.06, 0.11], ddof=1))
    assert one.lost == 7 and 0.05 < one.p < 0.15 and one.low < -0.11
    low, high = one.ends(1 - one.p)
    assert min(abs(low), abs(high)) < 1e-4  # p is that of the interval that ends at 0


def test_seeds_are_the_same_choice_in_every_task():
    """If a seed is bad on all tasks, the mean over tasks is as uncertain as one task; other seeds cancel nothing."""
    before = samples([1] * 500 + [0] * 500)
    after = {seed: samples([1] * (500 - 40 * seed) + [0] * (500 + 40 * seed)) for seed in range(5)}
    one = compare_seeds(before, after, "acc")
    same = mean_over_tasks([one] * 4)
    other = compare_seeds(before, {seed + 10: frame for seed, frame in after.items()}, "acc")
    assert same.seed_error == pytest.approx(one.seed_error)
    mixed = mean_over_tasks([one, other])
    assert mixed.by_seed == {} and mixed.seed_error == pytest.approx(one.seed_error) and mixed.seed_dof == 4
    assert mixed.low < mixed.difference < mixed.high and mixed.p < 0.2


# Verdicts


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (Interval(3.0, 2.0, 4.0), "reproduced"),
        (Interval(3.0, -2.0, 8.0), "undecided"),  # not significantly different from 3, and no evidence of 3 either
        (Interval(6.0, 5.2, 6.8), "not reproduced"),
        (Interval(4.8, 4.0, 5.6), "undecided"),
        (Interval.exact(4.99), "reproduced"),
        (Interval.exact(5.01), "not reproduced"),
        (Interval(4.0, 2.7, 5.1), "reproduced"),  # the 90 % interval decides: 2.9 to 4.9
        (Interval(4.0, 2.7, 5.1, (2.9, 5.05)), "undecided"),
        (None, "not run yet"),
    ],
)
def test_equal_is_an_equivalence_test(ours, verdict):
    assert judge(ours, "equals", 3.0, 2.0) == verdict
    if ours is not None:
        assert judge(-ours, "equals", -3.0, 2.0) == verdict


# The whole: a method against itself, and a true difference

TABLE = {"piqa": 1838, "hellaswag": 10042, "arc_challenge": 1172, "arc_easy": 2376, "boolq": 3270}
NOISE = 0.02  # share of items that flip in a rerun: near ties under other batches, kernels and precisions


def test_a_method_is_equal_to_itself():
    """A/A: 200 tables of a rerun that flips one item in fifty, as often to right as to wrong."""
    generator, equal, different = np.random.default_rng(0), [], []
    for _ in range(200):
        drawn = [(*generator.multinomial(n, [NOISE / 2, NOISE / 2, 1 - NOISE])[:2].tolist(), n) for n in TABLE.values()]
        tasks = [from_counts(*one) for one in drawn]
        margin = stats.MARGIN / 100
        adjusted = [*holm([one.p_equal(margin) for one in tasks]), mean_over_tasks(tasks).p_equal(margin)]
        equal.append(max(adjusted) < 0.05)
        different.append(min(holm([one.p for one in tasks])) < 0.05)
    assert np.mean(equal) >= 0.95
    assert np.mean(different) <= 0.05


@pytest.mark.parametrize(("flips", "comparisons"), [(0.08, 30), (0.10, 5), (0.10, 1)])
def test_a_difference_of_three_points_is_found(flips, comparisons):
    """1,838 items, of which 8 or 10 % flip; all other comparisons of the family are of methods that differ by nothing.

    CHAI's paper has 30 comparisons in Table 2; where other methods differ too, Holm's correction is smaller.
    """
    shares = [(flips + 0.03) / 2, (flips - 0.03) / 2, 1 - flips]
    draws = np.random.default_rng(1).multinomial(1838, shares, size=600)
    found = [holm([mcnemar(int(lost), int(gained)), *[1.0] * (comparisons - 1)])[0] < 0.05 for lost, gained, _ in draws]
    assert np.mean(found) >= 0.8
