"""Rules for the number of clusters, against enumeration."""

from __future__ import annotations

import itertools
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from chai.clustering.num_clusters import budget, check_saving, knee, plateau

PLANTED = np.array([[100, 60, 30, 1, 0.9, 0.5, 0.2, 0], [50, 1, 0.9, 0.8, 0.7, 0.6, 0.3, 0]])


@pytest.mark.parametrize("rule", [lambda e: plateau(e, 0.05), knee])
def test_a_cliff_is_found(rule):
    assert rule(PLANTED) == [4, 2]


def test_plateau_counts_the_last_gain_that_is_worth_it():
    assert plateau(np.array([[100, 99.5, 50, 49, 48.5, 0]]), 0.1) == [6]
    assert plateau(np.array([[100, 99.5, 50, 49, 48.5, 48]]), 0.1) == [3]
    assert plateau(np.array([[100, 99.5, 99, 98.5, 98, 97.5]]), 0.1) == [1]
    assert plateau(np.zeros((1, 6)), 0.1) == [1]
    assert knee(np.zeros((1, 6))) == [1]


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


def test_bad_budgets_are_refused():
    check_saving(None, 4)
    check_saving(0.375, 4)
    with pytest.raises(ValueError, match=r"cannot save 40 % .* maximum is 37.5 %"):
        check_saving(0.4, 4)
    with pytest.raises(ValueError, match="either a saving or a share"):
        budget(PLANTED, 8)
