"""Cluster counts per layer that the authors published, by name.

The release carries three lists, and none of them gives the paper's 21.4 % of K,V memory saved: see docs/results.md.
"""

from __future__ import annotations

PRESETS: dict[str, tuple[int, ...]] = {
    # params7b.json: keeps 61.7 % of the keys, saves 19.1 % of the K,V bytes.
    "llama7b_params": (32,) * 18 + (4,) * 14,
    # Default of the release's model arguments (`chai_layers`): keeps 36.7 % of the keys, saves 31.6 %.
    "llama7b_patch": (28,) * 3 + (18,) * 12 + (8,) * 2 + (4,) * 15,
    # params33b.json: keeps 47.1 % of the keys, saves 26.5 %.
    "llama33b_params": (48,) * 18 + (36,) * 8 + (24,) * 6 + (8,) * 2 + (6,) * 26,
}


def resolve_clusters(clusters: str | int | list[int] | tuple[int, ...], layers: int, heads: int) -> list[int]:
    """Cluster counts of each layer from a preset's name, one count for all layers, or a list.

    Raises:
        ValueError: an unknown name, a list of another length than the model's layers, or a count outside [1, heads].
    """
    if isinstance(clusters, str):
        if clusters not in PRESETS:
            raise ValueError(f"unknown preset of cluster counts '{clusters}'; valid: {', '.join(PRESETS)}")
        counts = list(PRESETS[clusters])
        origin = f"preset '{clusters}'"
    else:
        counts = [clusters] * layers if isinstance(clusters, int) else list(clusters)
        origin = "clusters"
    if not all(type(count) is int for count in counts):
        raise ValueError(f"{origin} is {counts}; valid: whole numbers")
    if len(counts) != layers:
        raise ValueError(f"{origin} has {len(counts)} counts, the model has {layers} layers")
    wrong = sorted({count for count in counts if not 1 <= count <= heads})
    if wrong:
        raise ValueError(f"{origin}: {wrong[0]} clusters in a layer of {heads} heads; valid: 1 to {heads}")
    return counts
