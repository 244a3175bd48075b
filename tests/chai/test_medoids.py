"""Representatives by their costs, against enumeration of all choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from chai.clustering.medoids import cheapest_members, medoid_clusters, refine_jointly


def random_costs(problems: int, heads: int, seed: int = 0) -> np.ndarray:
    """Costs that are neither symmetric nor distances; 0 on the diagonal."""
    costs = np.random.default_rng(seed).gamma(0.7, size=(problems, heads, heads))
    costs[:, np.arange(heads), np.arange(heads)] = 0
    return costs.astype(np.float32)


def total(cost: np.ndarray, labels: np.ndarray, representatives: np.ndarray) -> float:
    """Sum over heads of the cost at the own representative."""
    return sum(float(cost[h, representatives[label]]) for h, label in enumerate(labels))


def best(cost: np.ndarray, k: int) -> float:
    heads = range(len(cost))
    return min(
        sum(min(float(cost[h, r]) for r in chosen) for h in heads) for chosen in itertools.combinations(heads, k)
    )


@pytest.mark.parametrize("heads", [1, 2, 5, 9])
def test_no_set_of_representatives_costs_less(heads):
    counts = np.repeat(np.arange(1, heads + 1), 8)
    costs = random_costs(len(counts), heads, seed=heads)
    labels, representatives = medoid_clusters(costs, counts)
    for cost, row, own, k in zip(costs, labels, representatives, counts, strict=True):
        chosen = own[:k].tolist()
        assert chosen == sorted(set(chosen)) and (own[k:] == heads).all()
        assert row[chosen].tolist() == list(range(k))  # each represents itself
        assert total(cost, row, own) <= best(cost, int(k)) * (1 + 1e-3) + 1e-9


def test_ties_go_to_the_lowest_heads():
    labels, representatives = medoid_clusters(np.zeros((1, 6, 6), np.float32), np.array([3]))
    assert representatives.tolist() == [[0, 1, 2]] and labels.tolist() == [[0, 1, 2, 0, 0, 0]]


def test_many_heads_are_no_worse_than_random_choices():
    """20 of 40 heads: far more than 5,000 sets. The best of 300 random sets costs more, and no swap helps."""
    (cost,), k = random_costs(1, 40), 20
    labels, representatives = medoid_clusters(cost[None], np.array([k]))
    found = total(cost, labels[0], representatives[0])
    generator = np.random.default_rng(1)
    sets = [generator.permutation(40)[:k] for _ in range(300)]
    assert found < min(cost[:, chosen].min(1).sum() for chosen in sets)
    own = representatives[0].tolist()
    for place, other in itertools.product(range(k), set(range(40)) - set(own)):
        swapped = [*own[:place], other, *own[place + 1 :]]
        assert cost[:, swapped].min(1).sum() >= found * (1 - 2e-4)


def test_counts_outside_are_refused():
    with pytest.raises(ValueError, match="4 heads cannot have 5 clusters; valid: 1 to 4"):
        medoid_clusters(random_costs(1, 4), np.array([5]))


def test_the_cheapest_member_represents_a_cluster():
    generator = np.random.default_rng(0)
    costs, counts = random_costs(30, 8), generator.integers(1, 9, 30)
    labels = np.stack([generator.permutation(np.r_[np.arange(k), generator.integers(0, k, 8 - k)]) for k in counts])
    found, representatives = cheapest_members(costs, labels, counts)
    for cost, before, after, own, k in zip(costs, labels, found, representatives, counts, strict=True):
        assert own[:k].tolist() == sorted(own[:k]) and (own[k:] == 8).all()
        assert ((before[:, None] == before) == (after[:, None] == after)).all()  # the clusters stay
        for label in range(k):
            members = np.flatnonzero(after == label)
            sums = {int(r): sum(float(cost[h, r]) for h in members) for r in members}
            assert own[label] in members and sums[int(own[label])] <= min(sums.values()) * (1 + 1e-3)


def errors_of(problems: int, heads: int, width: int, seed: int) -> np.ndarray:
    """Error vectors ``[N, H, H, width]``; none for a head that represents itself."""
    errors = np.random.default_rng(seed).normal(size=(problems, heads, heads, width))
    errors[:, np.arange(heads), np.arange(heads)] = 0
    return errors


def joint(errors: np.ndarray, labels, representatives) -> float:
    return float(np.square(sum(errors[h, representatives[label]] for h, label in enumerate(labels))).sum())


@pytest.mark.parametrize("width", [1, 4])
def test_refining_never_raises_the_joint_error_and_ends_where_no_single_move_helps(width):
    heads, counts = 7, np.repeat([1, 2, 3, 6, 7], 12)
    errors = errors_of(len(counts), heads, width, seed=3)
    flat = errors.reshape(len(counts), heads * heads, width)
    labels, representatives = medoid_clusters(np.square(errors).sum(-1).astype(np.float32), counts)
    before = labels.copy()
    found = refine_jointly(flat @ flat.swapaxes(1, 2), labels, representatives, counts)
    assert (labels == before).all() and (found != before).any()
    for own, old, new, chosen, k in zip(errors, before, found, representatives, counts, strict=True):
        assert new[chosen[:k]].tolist() == list(range(k))
        least = joint(own, new, chosen)
        assert least <= joint(own, old, chosen) + 1e-9
        for head, label in itertools.product(set(range(heads)) - set(chosen[:k].tolist()), range(k)):
            moved = new.copy()
            moved[head] = label
            assert joint(own, moved, chosen) >= least - 1e-6 * (1 + least)


def test_errors_that_cancel_are_found():
    """One free head: the descent is exact. Alone the first representative is nearer, together the second cancels."""
    errors = np.zeros((1, 4, 4, 2))
    errors[0, 3, 0], errors[0, 3, 1] = [1.0, 0.0], [-2.0, 0.0]
    errors[0, 2, 0], errors[0, 2, 1] = [2.0, 0.5], [9.0, 9.0]
    flat = errors.reshape(1, 16, 2)
    representatives, counts = np.array([[0, 1]]), np.array([2])
    start = np.array([[0, 1, 0, 0]])
    found = refine_jointly(flat @ flat.swapaxes(1, 2), start, representatives, counts)
    assert found.tolist() == [[0, 1, 0, 1]]
    options = [[0, 1, a, b] for a, b in itertools.product(range(2), repeat=2)]
    assert joint(errors[0], found[0], [0, 1]) == min(joint(errors[0], option, [0, 1]) for option in options)


@pytest.mark.parametrize("seed", range(10))
def test_one_free_head_is_assigned_as_well_as_can_be(seed):
    heads, k = 6, 5
    errors = errors_of(1, heads, 3, seed)
    errors[0, 5] += np.random.default_rng(seed).normal(size=3)  # also at a distance from all
    flat, representatives = errors.reshape(1, 36, 3), np.array([[0, 1, 2, 3, 4]])
    start = np.array([[0, 1, 2, 3, 4, 0]])
    found = refine_jointly(flat @ flat.swapaxes(1, 2), start, representatives, np.array([k]))
    options = [np.array([0, 1, 2, 3, 4, label]) for label in range(k)]
    assert joint(errors[0], found[0], range(5)) == pytest.approx(
        min(joint(errors[0], option, range(5)) for option in options)
    )
