"""The number of clusters of each layer: rules on the clustering error (paper, Section 3.2, Figure 8), and presets.

Every rule takes ``error [..., L, H]``, the error of layer l with k clusters at ``[..., l, k - 1]``, and returns counts
``[..., L]``.
"""

from __future__ import annotations

import numpy as np

from chai.clustering.kmeans import compiled

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


def budget(
    error: np.ndarray, num_kv_heads: int, *, saving: float | None = None, share: float | None = None
) -> np.ndarray:
    """Choose the best counts under one budget for all layers together, by dynamic programming.

    Args:
        error: See the module.
        num_kv_heads: KV heads of each layer; the cost of k clusters of H heads is ``ceil(k * num_kv_heads / H)``.
        saving: Share of the KV cache bytes to save (0 to 0.5), at the least total error.
        share: Allowed total error, as a share of that with one cluster in every layer, at the least KV heads.

    Raises:
        ValueError: Not even one cluster in each layer gives the saving; or neither or both budgets are given.
    """
    *batch, num_layers, num_heads = error.shape
    if (saving is None) == (share is None):
        raise ValueError("give either a saving or a share of the error")
    check_saving(saving, num_kv_heads)
    # Only the largest k of each cost is of interest.
    costs = -(-np.arange(1, num_heads + 1) * num_kv_heads // num_heads)
    counts = np.searchsorted(costs, np.arange(1, num_kv_heads + 1), side="right") - 1
    curves = error.reshape(-1, num_layers, num_heads).astype(np.float64)
    total = num_layers * num_kv_heads
    least, chosen = _least_errors(curves[:, :, counts])
    # Spend the budget.
    if saving is not None:
        most = int(np.floor(total * (1 - 2 * saving) + 1e-9))
        spent = least[:, : most + 1].argmin(1)
    else:
        allowed = share * curves[:, :, 0].sum(1, keepdims=True) + 1e-12
        spent = (least <= allowed).argmax(1)
    # Walk back through the choices.
    problems, schedule = np.arange(len(curves)), np.empty((len(curves), num_layers), dtype=np.int64)
    for layer in range(num_layers - 1, -1, -1):
        cost = chosen[layer, problems, spent]
        schedule[:, layer] = counts[cost - 1] + 1
        spent = spent - cost
    return schedule.reshape(*batch, num_layers)


@compiled
def _least_errors(options):  # type: ignore[no-untyped-def]
    """Distribute n KV heads over the layers with the least total error, for every n.

    Args:
        options: ``[N, L, C]``, error of a layer with 1 to C KV heads.

    Returns:
        The least errors ``[N, L * C + 1]``, infinite where n is too small, and the KV heads of layer l where the first
        l + 1 layers have n in all, ``[L, N, L * C + 1]``.
    """
    problems, layers, most = options.shape
    least = np.full((problems, layers * most + 1), np.inf)
    chosen = np.zeros((layers, problems, layers * most + 1), dtype=np.int16)
    for problem in range(problems):
        row = least[problem]
        row[0] = 0
        for layer in range(layers):
            # Downwards, since the errors of fewer KV heads are still those of the layers before.
            for heads in range((layer + 1) * most, -1, -1):
                best = np.inf
                for cost in range(1, min(most, heads) + 1):
                    error = row[heads - cost] + options[problem, layer, cost - 1]
                    if error < best:
                        best = error
                        chosen[layer, problem, heads] = cost
                row[heads] = best
    return least, chosen


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
