"""The number of clusters of each layer: rules on the clustering error (paper, Section 3.2, Figure 8), and presets.

Every rule takes ``error [L, H]``, the error of layer l with k clusters at ``[l, k - 1]``, and returns L counts.
"""

from __future__ import annotations

import numpy as np


def plateau(error: np.ndarray, tolerance: float) -> list[int]:
    """Choose the least k with ``E(j) - E(j + 1) < tolerance * E(1)`` for all ``j >= k``: where the fall ends."""
    gains = -np.diff(error, axis=1)
    worth = gains >= tolerance * error[:, :1]
    worth &= error[:, :1] > 0  # identical heads gain nothing
    last = np.where(worth.any(1), worth.shape[1] - worth[:, ::-1].argmax(1), 0)
    return [int(k) + 1 for k in last]


def knee(error: np.ndarray) -> list[int]:
    """Choose the k farthest below the line from the first point of the curve to its last: where it bends most.

    That is Kneedle (Satopaa et al., 2011) for a convex falling curve without noise.
    """
    count = error.shape[1]
    if count < 3:
        return [count] * len(error)
    height = np.maximum(error[:, :1] - error[:, -1:], np.finfo(float).tiny)
    fallen = (error[:, :1] - error) / height
    return [int(k) + 1 for k in (fallen - np.linspace(0, 1, count)).argmax(1)]


def budget(
    error: np.ndarray, num_kv_heads: int, *, saving: float | None = None, share: float | None = None
) -> list[int]:
    """Choose the best counts under one budget for all layers together, by dynamic programming.

    Args:
        error: See the module.
        num_kv_heads: KV heads of each layer; the cost of k clusters of H heads is ``ceil(k * num_kv_heads / H)``.
        saving: Share of the KV cache bytes to save (0 to 0.5), at the least total error.
        share: Allowed total error, as a share of that with one cluster in every layer, at the least KV heads.

    Raises:
        ValueError: Not even one cluster in each layer gives the saving; or neither or both budgets are given.
    """
    num_layers, num_heads = error.shape
    if (saving is None) == (share is None):
        raise ValueError("give either a saving or a share of the error")
    # Only the largest k of each cost is of interest.
    costs = -(-np.arange(1, num_heads + 1) * num_kv_heads // num_heads)
    counts = np.searchsorted(costs, np.arange(1, num_kv_heads + 1), side="right") - 1
    options = error[:, counts]  # [L, num_kv_heads]
    total = num_layers * num_kv_heads
    # least[l, n]: the least error of the first l layers with n KV heads in all; chosen[l, n]: those of layer l - 1.
    least = np.full((num_layers + 1, total + 1), np.inf)
    least[0, 0] = 0
    chosen = np.zeros((num_layers + 1, total + 1), dtype=np.int64)
    for layer in range(num_layers):
        for cost in range(1, num_kv_heads + 1):
            candidate = least[layer, : total + 1 - cost] + options[layer, cost - 1]
            better = candidate < least[layer + 1, cost:]
            least[layer + 1, cost:][better] = candidate[better]
            chosen[layer + 1, cost:][better] = cost
    # Spend the budget.
    if saving is not None:
        check_saving(saving, num_kv_heads)
        most = int(np.floor(total * (1 - 2 * saving) + 1e-9))
        spent = int(least[num_layers, : most + 1].argmin())
    else:
        reached = np.minimum.accumulate(least[num_layers])
        spent = int((reached <= share * error[:, 0].sum() + 1e-12).argmax())
    # Walk back through the choices.
    schedule = []
    for layer in range(num_layers, 0, -1):
        cost = int(chosen[layer, spent])
        schedule.append(int(counts[cost - 1]) + 1)
        spent -= cost
    return schedule[::-1]


def check_saving(saving: float | None, num_kv_heads: int) -> None:
    """Refuse a saving that even a single KV head in every layer does not give (ValueError)."""
    most = (1 - 1 / num_kv_heads) / 2
    if saving is not None and saving > most + 1e-9:
        raise ValueError(f"cannot save {100 * saving:g} % of the KV cache; the maximum is {100 * most:.4g} %")


#: Counts of each layer that the authors published. None of these lists gives the paper's saving of 21.4 %
#: (docs/results.md).
PRESETS: dict[str, tuple[int, ...]] = {
    # params7b.json: keeps 61.7 % of the keys, saves 19.1 % of the KV cache.
    "llama7b_params": (32,) * 18 + (4,) * 14,
    # Default of the release's model arguments (`chai_layers`): keeps 36.7 % of the keys, saves 31.6 %.
    "llama7b_patch": (28,) * 3 + (18,) * 12 + (8,) * 2 + (4,) * 15,
    # params33b.json: keeps 47.1 % of the keys, saves 26.5 %.
    "llama33b_params": (48,) * 18 + (36,) * 8 + (24,) * 6 + (8,) * 2 + (6,) * 26,
}


def resolve_clusters(clusters: str | int | list[int] | tuple[int, ...], num_layers: int, num_heads: int) -> list[int]:
    """Return the counts of each layer from the name of a preset, one count for all layers, or a list.

    Raises:
        ValueError: Unknown preset, a list of the wrong length, or a count outside [1, num_heads].
    """
    if isinstance(clusters, str):
        if clusters not in PRESETS:
            raise ValueError(f"unknown preset of cluster counts '{clusters}'; valid: {', '.join(PRESETS)}")
        counts = list(PRESETS[clusters])
        origin = f"preset '{clusters}'"
    else:
        counts = [clusters] * num_layers if isinstance(clusters, int) else list(clusters)
        origin = "clusters"
    if not all(type(count) is int for count in counts):
        raise ValueError(f"{origin} is {counts}; valid: whole numbers")
    if len(counts) != num_layers:
        raise ValueError(f"{origin} has {len(counts)} counts, the model has {num_layers} layers")
    wrong = sorted({count for count in counts if not 1 <= count <= num_heads})
    if wrong:
        raise ValueError(f"{origin}: {wrong[0]} clusters in a layer of {num_heads} heads; valid: 1 to {num_heads}")
    return counts
