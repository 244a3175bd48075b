"""The functions that find our number for a claim, by the name that ``results/paper/claims.csv`` has."""

from __future__ import annotations

from collections.abc import Callable

from analysis.report import accuracy, costs, heads
from analysis.report.source import Ours

#: Each takes a :class:`~analysis.report.source.Source`, the claim's model and its options, and raises a MissingRun.
Measure = Callable[..., Ours]
MEASURES: dict[str, Measure] = {
    measure.__name__: measure
    for measure in (
        costs.kv_saved, costs.cache_size, costs.weights_size, costs.cache_share, costs.speedup, costs.attention_share,
        accuracy.worst_loss, accuracy.unchanged_weights, accuracy.loss, accuracy.agreeing_cells, accuracy.tradeoff,
        heads.cluster_correlation, heads.correlation_growth, heads.first_layer_correlation, heads.uniform_heads,
        heads.largest_cluster, heads.cluster_skew, heads.settled_tokens,
    )
}  # fmt: skip
