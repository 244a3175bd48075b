"""Layer by layer: clusters, correlation of heads, bytes of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.plotting import correlation
from analysis.results.benchmarks import MEMORY, chai_memory
from analysis.results.profiles import PROFILE, best_profile
from analysis.results.runs import RANDOM, Results, Run, optional


@dataclass(frozen=True)
class Layer:
    """A layer's row and its columns in the CSV; ``None``: not measured."""

    layer: int  # counted from 0
    k: int | None = None  # clusters that CHAI ran with
    k_offline: int | None = None  # clusters that the offline phase found
    correlation: float | None = None  # mean over all pairs of heads
    within: float | None = None  # mean over pairs of heads of a cluster; NaN if no cluster has two
    mha_bytes: float | None = None
    chai_bytes: float | None = None
    saved_percent: float | None = None


@dataclass(frozen=True)
class Layers:
    """A model's layers."""

    model: str  # without the suffix of random weights
    heads: int  # query heads of a layer
    rows: Sequence[Layer]
    length: int | None  # tokens in the cache; None: bytes were not measured
    runs: Sequence[Run]  # source of the numbers
    commands: Sequence[str]  # measure what is missing
    note: str = ""  # why there are no bytes although they were measured


def of_model(results: Results, model: str) -> Layers | None:
    """Return a model's layers from its newest profile and its newest memory run of CHAI; ``None`` without either."""
    profile = optional(best_profile, results.of(model))
    memory = optional(chai_memory, results.of(model, with_random=True))
    if memory is not None and profile is not None and len(memory.result["heads_kept"]) != profile.layers:
        memory = None  # another model of that name
    # Name the commands of what is missing: memory runs need no weights, and the embedded model has its own.
    queries = ((profile, PROFILE, model), (memory, MEMORY, model if model == "tiny" else model + RANDOM))
    commands = [query.command_for(name) for source, query, name in queries if source is None]
    columns: dict[str, Sequence[Any]] = {}
    heads, length, note = 0, None, ""
    # From memory runs: CHAI's own counts, and bytes.
    if memory is not None:
        heads, length = int(memory.result["heads"]), int(memory.table.length.max())
        columns["k"] = memory.result["heads_kept"]
        sizes = _bytes(memory, length)
        columns |= sizes
        if not sizes:
            note = "Query heads share KV heads here, so the bytes of a layer do not follow from its clusters."
    # From the profile: the offline phase's counts, and correlations.
    if profile is not None:
        heads = profile.heads
        columns["k_offline"] = profile.clusters
        columns["correlation"] = correlation.between_heads(profile["correlation"]).tolist()
        pairs = zip(profile["correlation"], profile["assignment"], strict=True)
        columns["within"] = [correlation.within_and_between(*pair)[0] for pair in pairs]
    if not columns:
        return None
    rows = [Layer(layer, **row) for layer, row in enumerate(pd.DataFrame(columns).to_dict("records"))]
    runs = [run for run in (profile and profile.run, memory) if run]
    return Layers(model, heads, rows, length, runs, commands, note)


def _bytes(run: Run, length: int) -> dict[str, list[float]]:
    """Return the bytes of each layer's keys and values at a length; empty if they do not follow from the clusters.

    All layers of a model have the same shape, so each has the same share of MHA's bytes. Of that, CHAI keeps V and the
    representatives' K. The sum over the layers must be the size of the live tensors.
    """
    live = run.table[run.table.length == length].set_index("method").cache_bytes
    counts, heads = run.result["heads_kept"], int(run.result["heads"])
    mha = float(live["mha"]) / len(counts)
    chai = [mha * (k + heads) / (2 * heads) for k in counts]
    if not np.isclose(sum(chai), live["chai"], rtol=0.01):
        return {}
    saved = [100 * (1 - size / mha) for size in chai]
    return {"mha_bytes": [mha] * len(counts), "chai_bytes": chai, "saved_percent": saved}
