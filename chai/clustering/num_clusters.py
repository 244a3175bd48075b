"""The number of clusters of each layer: by the clustering error (paper, Section 3.2, Figure 8), a budget, or a preset.

The first rules take ``error [..., L, H]``, the error of layer l with k clusters at ``[..., l, k - 1]``, and return
counts ``[..., L]``. :func:`allocate` divides one budget among the layers, by what each of them loses.
"""

from __future__ import annotations

import numpy as np

#: A curve whose greatest distance from the chord is below this share of its height is straight, but for rounding.
STRAIGHT = 1e-6


def plateau(error: np.ndarray, tolerance: float) -> np.ndarray:
    """Choose the least k with ``E(j) - E(j + 1) < tolerance * E(1)`` for all ``j >= k``: where the fall ends.

    The scale of the tolerance depends on H: the mean gain of a cluster is ``E(1) / (H - 1)``. Heads that are all
    equally far apart gain just that with every cluster, so the rule keeps all of them while ``1 / (H - 1) >=
    tolerance``, and a single one beyond.
    """
    gains = -np.diff(error, axis=-1)
    worth = gains >= tolerance * error[..., :1]
    worth &= error[..., :1] > 0  # identical heads gain nothing
    steps = worth.shape[-1]
    if not steps:
        return np.ones(error.shape[:-1], dtype=np.int64)
    return np.where(worth.any(-1), steps - worth[..., ::-1].argmax(-1), 0) + 1


def knee(error: np.ndarray) -> np.ndarray:
    """Choose the k farthest below the line from the first point of the curve to its last: where it bends most.

    That is Kneedle (Satopaa et al., 2011) for a convex falling curve without noise. A curve that falls without a bend
    has no knee: every head is kept. Identical heads, whose error is 0, get a single cluster.
    """
    count = error.shape[-1]
    if count < 3:
        return np.full(error.shape[:-1], count)
    height = error[..., :1] - error[..., -1:]
    fallen = (error[..., :1] - error) / np.maximum(height, np.finfo(float).tiny)
    below = fallen - np.linspace(0, 1, count)
    chosen = np.where(below.max(-1) > STRAIGHT, below.argmax(-1) + 1, count)
    return np.where(height[..., 0] > 0, chosen, 1)


def allocate(
    loss: np.ndarray, cost: np.ndarray, *, most_cost: int | None = None, most_loss: float | None = None
) -> np.ndarray:
    """Choose an option for each layer under one budget for all layers together, by dynamic programming.

    The least total loss that costs at most ``most_cost``, or the least total cost with a loss of at most ``most_loss``.
    Losses of layers are added up as if each were clustered alone.

    Args:
        loss: ``[..., L, C]``, of each option in each layer.
        cost: ``[L, C]``, whole numbers: computed heads, or stored KV heads.
        most_cost: Budget of the costs; give either this one,
        most_loss: or the budget of the losses.

    Returns:
        Indices of options, ``[..., L]``.

    Raises:
        ValueError: The budget cannot be met; or neither or both are given.
    """
    if (most_cost is None) == (most_loss is None):
        raise ValueError("give either a budget of the cost or of the loss")
    *batch, num_layers, num_options = loss.shape
    curves = loss.reshape(-1, num_layers, num_options).astype(np.float64)
    total = int(cost.max(1).sum())
    # least[n]: least loss of the layers so far that cost n together; chosen[l][n]: the option of layer l.
    least = np.full((len(curves), total + 1), np.inf)
    least[:, 0] = 0
    chosen = np.zeros((num_layers, *least.shape), dtype=np.int16)
    for layer in range(num_layers):
        best = np.full_like(least, np.inf)
        for option in range(num_options):
            step = int(cost[layer, option])
            losses = np.full_like(least, np.inf)
            losses[:, step:] = least[:, : total + 1 - step] + curves[:, layer, option, None]
            better = losses < best
            best[better] = losses[better]
            chosen[layer][better] = option
        least = best
    # Spend the budget.
    if most_cost is not None:
        affordable = least[:, : max(most_cost, -1) + 1]
        if not affordable.size or not np.isfinite(affordable.min(1)).all():
            raise ValueError(f"the cost is at least {int(cost.min(1).sum())}; the budget is {most_cost}")
        spent = affordable.argmin(1)
    else:
        assert most_loss is not None
        within = least <= most_loss + 1e-12
        if not within.any(1).all():
            raise ValueError(f"the loss is at least {float(least.min(1).max()):.3g}; the budget is {most_loss:g}")
        spent = within.argmax(1)
    # Walk back through the choices.
    problems, schedule = np.arange(len(curves)), np.empty((len(curves), num_layers), dtype=np.int64)
    for layer in range(num_layers - 1, -1, -1):
        schedule[:, layer] = chosen[layer, problems, spent]
        spent = spent - cost[layer, schedule[:, layer]]
    return schedule.reshape(*batch, num_layers)


def allocate_greedily(loss: np.ndarray, cost: np.ndarray, most_cost: int) -> np.ndarray:
    """Choose an option for each layer by walking down the lower hulls: each step loses least for what it saves.

    It is what :func:`allocate` is compared with. Losses ``[L, C]``, costs and result as there; each layer begins with
    its option of the highest cost.
    """
    layers = np.arange(len(loss))
    current = cost.argmax(1)
    while cost[layers, current].sum() > most_cost:
        saved = cost[layers, current][:, None] - cost
        slope = np.where(saved > 0, (loss - loss[layers, current][:, None]) / np.maximum(saved, 1), np.inf)
        if not np.isfinite(slope).any():
            raise ValueError(f"the cost is at least {int(cost.min(1).sum())}; the budget is {most_cost}")
        layer, option = np.unravel_index(slope.argmin(), slope.shape)
        current[layer] = option
    return current


def check_saving(saving: float, num_kv_heads: int, least: int = 1) -> None:
    """Refuse a saving that even the least number of KV heads in every layer does not give (ValueError)."""
    most = (1 - least / num_kv_heads) / 2
    if saving > most + 1e-9:
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
