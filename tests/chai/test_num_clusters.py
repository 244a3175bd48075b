"""Rules for the number of clusters, against enumeration."""

from __future__ import annotations

import itertools
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from chai.clustering.kmeans import sweep
from chai.clustering.num_clusters import budget, check_saving, knee, plateau

PLANTED = np.array([[100, 60, 30, 1, 0.9, 0.5, 0.2, 0], [50, 1, 0.9, 0.8, 0.7, 0.6, 0.3, 0]])


@pytest.mark.parametrize("rule", [lambda e: plateau(e, 0.05), knee])
def test_a_cliff_is_found(rule):
    assert rule(PLANTED).tolist() == [4, 2]
    assert rule(np.stack([PLANTED, PLANTED[::-1]])).tolist() == [[4, 2], [2, 4]]


def test_plateau_counts_the_last_gain_that_is_worth_it():
    assert plateau(np.array([[100, 99.5, 50, 49, 48.5, 0]]), 0.1) == [6]
    assert plateau(np.array([[100, 99.5, 50, 49, 48.5, 48]]), 0.1) == [3]
    assert plateau(np.array([[100, 99.5, 99, 98.5, 98, 97.5]]), 0.1) == [1]
    assert plateau(np.zeros((1, 6)), 0.1) == [1]
    assert knee(np.zeros((1, 6))) == [1]
    assert plateau(np.ones((2, 1)), 0.1).tolist() == knee(np.ones((2, 1))).tolist() == [1, 1]


def equidistant(heads: int) -> np.ndarray:
    """Error of heads that are all equally far apart, at distance 1: a cluster of n has (n - 1) / 2."""
    return (heads - np.arange(1, heads + 1))[None] / 2


def test_the_plateau_of_heads_without_structure_depends_on_their_number():
    """As docs/profile.md says: the scale of the tolerance is the mean gain, E(1) / (H - 1)."""
    for heads, k in ((8, 8), (32, 32), (72, 72), (101, 101), (102, 1), (128, 1)):
        assert plateau(equidistant(heads), 0.01) == [k]
        errors = sweep((1 - np.eye(heads, dtype=np.float32))[None])[0]
        np.testing.assert_allclose(errors, equidistant(heads), atol=1e-4 * heads)


def test_a_curve_without_a_bend_keeps_every_head():
    for heads in (3, 8, 32, 128):
        assert knee(equidistant(heads)) == [heads]
        assert knee(sweep((1 - np.eye(heads, dtype=np.float32))[None])[0]) == [heads]


def test_further_copies_of_heads_move_the_knee_and_not_the_plateau():
    """The same fall, followed by more and more clusters that gain nothing; a smooth fall has no k of its own."""
    fall = 100 * np.exp(-np.arange(8) / 2)
    flat = [np.concatenate([fall - fall[-1], np.zeros(more)])[None] for more in (0, 8, 64)]
    assert [int(plateau(error, 0.01)[0]) for error in flat] == [8, 8, 8]
    found = [int(knee(error)[0]) for error in flat]
    assert found == sorted(found) and found[0] < found[-1]


def falling(layers: int, heads: int, seed: int) -> np.ndarray:
    """Errors that fall to zero, not convex in general."""
    steps = np.random.default_rng(seed).dirichlet(np.ones(heads - 1) * 0.5, layers) * [[1.0], [5.0], [0.3]][:layers]
    return np.concatenate([steps[:, ::-1].cumsum(1)[:, ::-1], np.zeros((layers, 1))], 1)


@settings(max_examples=40, deadline=None)
@given(
    seed=some.integers(0, 10_000),
    key_heads=some.sampled_from([1, 2, 4]),
    saving=some.sampled_from([0.05, 0.1, 0.2, 0.3]),
    share=some.sampled_from([0.02, 0.1, 0.3]),
)
def test_a_budget_is_spent_as_well_as_can_be(seed, key_heads, saving, share):
    """Against all schedules of three layers of four heads."""
    error = falling(3, 4, seed)
    every = []
    for counts in itertools.product(range(1, 5), repeat=3):
        cost = sum(ceil(k * key_heads / 4) for k in counts)
        every.append((cost, sum(error[layer, k - 1] for layer, k in enumerate(counts)), counts))

    def both(counts):
        return next((cost, total) for cost, total, own in every if own == tuple(counts))

    cost, total = both(budget(error, key_heads, share=share))
    bound = share * error[:, 0].sum()
    assert total <= bound + 1e-9
    assert cost == min(c for c, t, _ in every if t <= bound + 1e-12)
    most = 3 * key_heads * (1 - 2 * saving) + 1e-9
    if most < 3:
        with pytest.raises(ValueError, match=r"cannot save .* the maximum is"):
            budget(error, key_heads, saving=0.5 if key_heads == 1 else saving + 0.2)
        return
    cost, total = both(budget(error, key_heads, saving=saving))
    assert cost <= most
    assert total == pytest.approx(min(t for c, t, _ in every if c <= most))


@pytest.mark.parametrize("budgeted", [{"saving": 0.2}, {"share": 0.2}])
def test_many_problems_at_once_are_each_by_itself(budgeted):
    errors = np.stack([falling(3, 4, seed) for seed in range(6)])
    alone = [budget(error, 4, **budgeted).tolist() for error in errors]
    assert budget(errors.reshape(2, 3, 3, 4), 4, **budgeted).reshape(6, 3).tolist() == alone
    assert len(set(map(tuple, alone))) > 1


def test_bad_budgets_are_refused():
    check_saving(None, 4)
    check_saving(0.375, 4)
    with pytest.raises(ValueError, match=r"cannot save 40 % .* maximum is 37.5 %"):
        check_saving(0.4, 4)
    with pytest.raises(ValueError, match="either a saving or a share"):
        budget(PLANTED, 8)
