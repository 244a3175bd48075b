"""How many clusters each layer gets, from its clustering error against their number (paper, section 3.2, Figure 8).

Every rule takes ``error [L, H]``, the error of layer l with k clusters at ``[l, k - 1]``, and returns L counts.
"""

from __future__ import annotations

import numpy as np


def plateau(error: np.ndarray, tolerance: float) -> list[int]:
    """Where the error stops falling: the smallest k after which no further cluster gains more than a tolerance.

    Equation: the least k with ``E(j) - E(j + 1) < tolerance * E(1)`` for all ``j >= k``.

    Args:
        error: see the module.
        tolerance: share of the error of a single cluster, above 0.
    """
    gains = -np.diff(error, axis=1)
    worth = gains >= tolerance * error[:, :1]
    worth &= error[:, :1] > 0  # heads that are all the same gain nothing
    last = np.where(worth.any(1), worth.shape[1] - worth[:, ::-1].argmax(1), 0)
    return [int(k) + 1 for k in last]


def knee(error: np.ndarray) -> list[int]:
    """Where the curve bends most: the k farthest below the line from its first point to its last.

    That is Kneedle (Satopaa et al., 2011) for a convex falling curve without noise.
    """
    count = error.shape[1]
    if count < 3:
        return [count] * len(error)
    height = np.maximum(error[:, :1] - error[:, -1:], np.finfo(float).tiny)
    fallen = (error[:, :1] - error) / height
    return [int(k) + 1 for k in (fallen - np.linspace(0, 1, count)).argmax(1)]


def budget(error: np.ndarray, key_heads: int, *, saving: float | None = None, share: float | None = None) -> list[int]:
    """The best schedule under one budget for all layers together, by dynamic programming.

    Args:
        error: see the module.
        key_heads: of each layer; k clusters of H heads keep ``ceil(k * key_heads / H)`` of them, which costs as much.
        saving: keep so few key heads that this share of the K,V bytes is saved (0 to 0.5), at the least total error.
        share: keep as few key heads as do for a total error of this share of that with one cluster in every layer.

    Raises:
        ValueError: a saving that not even one cluster in each layer gives, or neither or both budgets.
    """
    layers, heads = error.shape
    if (saving is None) == (share is None):
        raise ValueError("a budget is either a saving or a share of the error")
    costs = -(-np.arange(1, heads + 1) * key_heads // heads)
    counts = np.searchsorted(costs, np.arange(1, key_heads + 1), side="right") - 1  # the largest k that costs as much
    options = error[:, counts]  # [L, key_heads]
    total = layers * key_heads
    least = np.full((layers + 1, total + 1), np.inf)  # [l, n]: error of the first l layers with n key heads kept
    least[0, 0] = 0
    taken = np.zeros((layers + 1, total + 1), dtype=np.int64)
    for layer in range(layers):
        for cost in range(1, key_heads + 1):
            found = least[layer, : total + 1 - cost] + options[layer, cost - 1]
            better = found < least[layer + 1, cost:]
            least[layer + 1, cost:][better] = found[better]
            taken[layer + 1, cost:][better] = cost
    reached = np.minimum.accumulate(least[layers])
    if saving is not None:
        check_saving(saving, key_heads)
        most = int(np.floor(total * (1 - 2 * saving) + 1e-9))
        kept = int(least[layers, : most + 1].argmin())
    else:
        kept = int((reached <= share * error[:, 0].sum() + 1e-12).argmax())
    chosen = []
    for layer in range(layers, 0, -1):
        cost = int(taken[layer, kept])
        chosen.append(int(counts[cost - 1]) + 1)
        kept -= cost
    return chosen[::-1]


def check_saving(saving: float | None, key_heads: int) -> None:
    """Refuse a share of the K,V bytes that even a single key head in every layer doesn't save.

    Raises:
        ValueError: names the most that can be saved.
    """
    most = (1 - 1 / key_heads) / 2
    if saving is not None and saving > most + 1e-9:
        raise ValueError(f"saving {100 * saving:g} % of the K,V bytes can't be had; valid: up to {100 * most:.4g} %")
