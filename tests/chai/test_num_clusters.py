"""Rules for the number of clusters, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from chai.clustering.kmeans import sweep
from chai.clustering.num_clusters import allocate, allocate_greedily, check_saving, knee, plateau

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


def schedules(cost: np.ndarray, loss: np.ndarray) -> list[tuple[int, float, tuple[int, ...]]]:
    """Cost and loss of every choice of options, with the options."""
    layers = range(len(cost))
    return [
        (
            sum(int(cost[layer, own[layer]]) for layer in layers),
            sum(float(loss[layer, own[layer]]) for layer in layers),
            own,
        )
        for own in itertools.product(range(cost.shape[1]), repeat=len(cost))
    ]


def random_problem(seed: int, layers: int = 4, options: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall with the cost in tendency alone, and costs that differ between layers."""
    generator = np.random.default_rng(seed)
    cost = generator.integers(0, 7, (layers, options))
    return generator.gamma(0.8, size=(layers, options)) / (1 + cost), cost


@settings(max_examples=60, deadline=None)
@given(seed=some.integers(0, 10_000), budget=some.integers(-1, 30), share=some.floats(0.01, 1.5))
def test_a_budget_is_spent_as_well_as_can_be(seed, budget, share):
    """Against all schedules, for a budget of the costs and one of the losses."""
    loss, cost = random_problem(seed)
    every = schedules(cost, loss)
    layers = np.arange(4)
    affordable = [total for price, total, _ in every if price <= budget]
    if affordable:
        found = allocate(loss, cost, most_cost=budget)
        assert cost[layers, found].sum() <= budget
        assert loss[layers, found].sum() == pytest.approx(min(affordable))
        greedy = allocate_greedily(loss, cost, budget)
        assert cost[layers, greedy].sum() <= budget
        assert loss[layers, greedy].sum() >= loss[layers, found].sum() - 1e-9
    else:
        least = int(cost.min(1).sum())
        for give in (lambda: allocate(loss, cost, most_cost=budget), lambda: allocate_greedily(loss, cost, budget)):
            with pytest.raises(ValueError, match=f"the cost is at least {least}; the budget is {budget}"):
                give()
    bound = share * float(loss.min(1).sum())
    within = [price for price, total, _ in every if total <= bound]
    if within:
        found = allocate(loss, cost, most_loss=bound)
        assert loss[layers, found].sum() <= bound + 1e-9
        assert cost[layers, found].sum() <= min(within)
    else:
        with pytest.raises(ValueError, match="the loss is at least .*; the budget is"):
            allocate(loss, cost, most_loss=bound)


@pytest.mark.parametrize("budgeted", [{"most_cost": 12}, {"most_loss": 1.2}])
def test_many_problems_at_once_are_each_by_itself(budgeted):
    cost = np.array([[1, 2, 4, 8], [0, 2, 3, 4], [1, 3, 5, 7]])
    losses = np.random.default_rng(0).dirichlet(np.ones(4), (6, 3))[..., ::-1].cumsum(-1)[..., ::-1]
    alone = [allocate(own, cost, **budgeted).tolist() for own in losses]
    assert allocate(losses.reshape(2, 3, 3, 4), cost, **budgeted).reshape(6, 3).tolist() == alone
    assert len(set(map(tuple, alone))) > 1


def test_one_of_many_problems_that_cannot_meet_the_budget_is_refused():
    cost = np.array([[1, 2], [1, 2]])
    losses = np.array([[[0.1, 0], [0.1, 0]], [[2.0, 1.0], [2.0, 1.0]]])
    with pytest.raises(ValueError, match="the loss is at least 2; the budget is 1"):
        allocate(losses, cost, most_loss=1.0)


def test_a_long_step_of_the_hull_is_taken_at_once():
    """The middle option is above the hull: the greedy walk skips it, the exact one takes it if the budget needs it."""
    cost = np.array([[2, 1, 0], [2, 1, 0]])
    loss = np.array([[0, 0.9, 1.0], [0, 5.0, 9.0]])
    assert allocate_greedily(loss, cost, 3).tolist() == [2, 0] and allocate(loss, cost, most_cost=3).tolist() == [1, 0]
    assert allocate_greedily(loss, cost, 2).tolist() == allocate(loss, cost, most_cost=2).tolist() == [2, 0]


def test_bad_budgets_are_refused():
    check_saving(0.375, 4)
    with pytest.raises(ValueError, match=r"cannot save 40 % .* maximum is 37.5 %"):
        check_saving(0.4, 4)
    with pytest.raises(ValueError, match=r"cannot save 48 % .* maximum is 46.88 %"):
        check_saving(0.48, 32, least=2)
    for budgets in ({}, {"most_cost": 3, "most_loss": 0.1}):
        with pytest.raises(ValueError, match="either a budget of the cost or of the loss"):
            allocate(np.zeros((1, 2)), np.ones((1, 2)), **budgets)
