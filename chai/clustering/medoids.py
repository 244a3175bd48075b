"""K-medoids: the representatives that cost the heads least, for costs that need not be distances.

``cost [N, H, H]`` of a problem has, at ``[h, r]``, what it costs that head r stands for head h (0 for r = h). It may
differ from that at ``[r, h]``, as the error of the output does (:mod:`chai.clustering.distances`). Functions that look
at candidates take it as ``reach [N, A, H]``, with a candidate in each row.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from math import ceil, comb

import numpy as np

#: Up to this many sets of medoids, all are tried.
EXHAUSTIVE = 5000


def medoid_clusters(cost: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose k representatives, and assign each head to the one at which it costs least.

    All sets of representatives are tried; where there are more than 5,000, a greedy choice is improved by swaps.

    Args:
        cost: ``[N, H, H]``; see the module.
        counts: ``[N]``, k of each problem.

    Returns:
        labels ``[N, H]`` and representatives ``[N, k_max]`` (ascending, padded with H); clusters are numbered by their
        representatives.

    Raises:
        ValueError: A k is outside ``[1, H]``.
    """
    num_heads = cost.shape[2]
    check_counts(counts, num_heads)
    labels = np.empty(cost.shape[:2], dtype=np.int64)
    representatives = np.full((len(cost), counts.max(initial=1)), num_heads)
    for k in set(counts.tolist()):
        (problems,) = (counts == k).nonzero()
        reach = cost[problems].swapaxes(1, 2)
        sets = medoid_sets(reach, k)
        rows = np.arange(len(sets))
        costs = reach[rows[:, None, None], sets].min(2).sum(-1)
        chosen = sets[rows, first_least(costs)]
        labels[problems], representatives[problems, :k] = assign(reach, chosen), chosen
    return labels, representatives


def cheapest_members(cost: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose in each cluster the member that costs the members least; of those within 0.01 %, the lowest.

    From ``cost [N, H, H]``, labels ``[N, H]`` and counts ``[N]`` to labels and representatives as in
    :func:`medoid_clusters`.
    """
    num_heads = labels.shape[1]
    representatives = np.full((len(labels), counts.max(initial=1)), num_heads)
    numbered = np.empty_like(labels)
    for problem, (own, row, k) in enumerate(zip(cost, labels, counts, strict=True)):
        chosen = []
        for label in range(k):
            (members,) = (row == label).nonzero()
            chosen.append(members[first_least(own[np.ix_(members, members)].sum(0))])
        order = np.argsort(chosen)
        representatives[problem, :k] = np.array(chosen)[order]
        numbered[problem] = np.argsort(order)[row]
    return numbered, representatives


def check_counts(counts: np.ndarray, num_heads: int) -> None:
    """Refuse numbers of clusters that this many heads cannot have (ValueError)."""
    for wrong in counts[(counts < 1) | (counts > num_heads)]:
        raise ValueError(f"{num_heads} heads cannot have {wrong} clusters; valid: 1 to {num_heads}")


def assign(reach: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Assign each head to the chosen candidate ``[N, k]`` at which it costs least: labels ``[N, H]``."""
    labels = first_least(reach[np.arange(len(reach))[:, None], chosen].swapaxes(1, 2))
    np.put_along_axis(labels, chosen, np.arange(chosen.shape[1])[None], 1)  # its own cluster, also where heads coincide
    return labels


def first_least(cost: np.ndarray) -> np.ndarray:
    """Return the index of the first non-negative cost along the last axis that is within 0.01 % of the least."""
    return (cost <= cost.min(-1, keepdims=True) * (1 + 1e-4) + 1e-12).argmax(-1)


def medoid_sets(reach: np.ndarray, size: int) -> np.ndarray:
    """Return the best few sets of candidates, ``[N, sets, size]``; a single set where not all can be tried.

    The sets of a problem are in lexicographic order, not in that of their costs; the members of a set are ascending.

    ``reach [N, A, H]``: see the module.
    """
    problems, candidates, _ = reach.shape
    if comb(candidates, size) <= EXHAUSTIVE:
        sets = np.array(list(combinations(range(candidates), size)))
        parts = np.array_split(reach, ceil(problems * len(sets) / 10_000))  # to bound the memory
        costs = np.concatenate([part[:, sets].min(2).sum(-1) for part in parts])
        return sets[np.sort(costs.argsort(1, kind="stable")[:, :16])]
    # Greedy: add the candidate that lowers the cost most, then swap.
    rows = np.arange(problems)
    chosen = np.empty((problems, 0), dtype=np.int64)
    nearest = np.full(reach[:, 0].shape, np.inf)
    for _ in range(size):
        costs = np.minimum(reach, nearest[:, None]).sum(-1)
        costs[rows[:, None], chosen] = np.inf
        chosen = np.append(chosen, first_least(costs)[:, None], 1)
        nearest = np.minimum(nearest, reach[rows, chosen[:, -1]])
    return swap_medoids(reach, chosen)[:, None]


def swap_medoids(reach: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Swap chosen medoids for others, the best swap first, until none lowers the cost by more than 0.01 %.

    ``reach [N, A, H]``: see the module; ``chosen [N, size]`` are indices of candidates, changed in place; returned
    ascending.
    """
    candidates, size = reach.shape[1], chosen.shape[1]
    active = np.arange(len(reach) if size < candidates else 0)
    while len(active):
        inside = reach[active[:, None], chosen[active]]
        # Cost at the best medoid without each of them; cost [N, size, A] of each swap.
        without = np.where(np.eye(size, dtype=bool)[..., None], np.inf, inside[:, None]).min(2)
        costs = np.minimum(without[:, :, None], reach[active, None]).sum(-1)
        costs[np.arange(len(active))[:, None], :, chosen[active]] = np.inf
        flat = costs.reshape(len(active), -1)
        better = flat.min(1) < (1 - 1e-4) * inside.min(1).sum(-1)
        active, best = active[better], first_least(flat[better])
        chosen[active, best // candidates] = best % candidates
    return np.sort(chosen)


def refine_jointly(
    gram: Iterable[np.ndarray], labels: np.ndarray, representatives: np.ndarray, counts: np.ndarray, sweeps: int = 20
) -> np.ndarray:
    """Reassign heads, one at a time, while that lowers the error of all heads together.

    The error of head h with representative r is a vector, ``e_hr = (A_r - A_h) V_h W_O,h``, and the layer's output is
    wrong by their sum. So the errors of two heads may cancel, which a sum of single costs ``|e_hr|^2`` does not see:

        |sum_h e_h,r(h)|^2 = sum_h,g <e_h,r(h), e_g,r(g)>

    Args:
        gram: N times ``[H * H, H * H]``, the products ``<e_hr, e_gs>`` at ``[h * H + r, g * H + s]``.
        labels: ``[N, H]``, the clusters to begin with.
        representatives: ``[N, k_max]``; they stay.
        counts: ``[N]``, k of each problem.
        sweeps: Most passes over the heads.

    Returns:
        Labels ``[N, H]``.
    """
    labels = labels.copy()
    heads = np.arange(labels.shape[1])
    for products, row, own, k in zip(gram, labels, representatives, counts, strict=True):
        chosen = own[:k]
        members = np.setdiff1d(heads, chosen)
        for _ in range(sweeps):
            moved = False
            for head in members:
                others = heads[heads != head] * len(heads) + own[row[heads != head]]
                options = head * len(heads) + chosen
                errors = products[options, options] + 2 * products[options][:, others].sum(1)
                best = int(errors.argmin())
                if errors[best] < errors[row[head]] - 1e-9 * abs(errors[row[head]]):
                    row[head], moved = best, True
            if not moved:
                break
    return labels
