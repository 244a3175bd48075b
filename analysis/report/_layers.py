"""Layer by layer: clusters, how alike the heads attend, bytes of the K,V cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis import profiles
from analysis.figures import _correlation, _profile, fig11
from analysis.profiles import Profile
from analysis.saved import MissingRun, Results, Run


@dataclass(frozen=True)
class Layer:
    """A row.

    Attributes:
        number: counted from 0.
        k: clusters that CHAI ran with; ``None``: not measured, as in all that follow.
        found: clusters that the offline phase found.
        correlation: mean of all pairs of two heads.
        within: mean of two heads of a cluster; NaN where no cluster has two.
        full: MHA's bytes of K and V.
        kept: CHAI's.
    """

    number: int
    k: int | None
    found: int | None
    correlation: float | None
    within: float | None
    full: float | None
    kept: float | None

    @property
    def saved(self) -> float | None:
        """Share of the bytes, %."""
        return None if self.full is None or self.kept is None else 100 * (1 - self.kept / self.full)


@dataclass(frozen=True)
class Layers:
    """A model's layers.

    Attributes:
        model: as it is filed, without what says that weights are random.
        heads: query heads of a layer.
        rows: one for each layer.
        length: tokens in the cache; ``None``: bytes weren't measured.
        runs: all is computed from.
        commands: of what isn't there.
        note: why there are no bytes although they were measured.
    """

    model: str
    heads: int
    rows: Sequence[Layer]
    length: int | None
    runs: Sequence[Run]
    commands: Sequence[str]
    note: str = ""


def of_model(results: Results, model: str) -> Layers | None:
    """A model's layers from its newest profile and its newest memory run of CHAI; ``None`` without either.

    Args:
        results: where they are looked for.
        model: its name.
    """
    profile, memory = _profiled(results, model), _memory(results, model)
    if memory is not None and profile is not None and len(memory.result["heads_kept"]) != profile.layers:
        memory = None  # another model of that name
    commands = [
        _for(model, command)
        for there, command in ((profile, _profile.COMMAND), (memory, fig11.COMMAND))
        if there is None
    ]
    if profile is None and memory is None:
        return None
    kept = memory.result["heads_kept"] if memory else []
    count = profile.layers if profile else len(kept)
    length, full, bytes_kept, note = _bytes(memory)
    mean = _correlation.between_heads(profile["correlation"]) if profile else np.empty(0)
    rows = [
        Layer(
            number,
            kept[number] if memory else None,
            profile.clusters[number] if profile else None,
            float(mean[number]) if profile else None,
            _correlation.within_and_between(profile["correlation"][number], profile["assignment"][number])[0]
            if profile
            else None,
            full,
            bytes_kept[number] if bytes_kept else None,
        )
        for number in range(count)
    ]
    heads = profile.heads if profile else int(memory.result["heads"]) if memory else 0
    runs = [run for run in (profile.run if profile else None, memory) if run]
    return Layers(model, heads, rows, length, runs, commands, note)


def _for(model: str, command: str) -> str:
    words = [f"model={model}" if word.startswith("model=") else word for word in command.split()]
    if model == "tiny":  # without a corpus from the hub, and with its own weights
        words = [word for word in words if not word.startswith(("corpus=", "model.random_init="))]
    return " ".join(words)


def _profiled(results: Results, model: str) -> Profile | None:
    try:
        return profiles.best(results.of(model))
    except MissingRun:
        return None


def _memory(results: Results, model: str) -> Run | None:
    def usable(run: Run) -> bool:
        return run.method == "chai" and {"mha", "chai"} <= set(run.table.method)

    try:
        return results.of(f"{model},{model}-random").newest(fig11.EXPERIMENT, fig11.COLUMNS, fig11.FIELDS, usable)
    except MissingRun:
        return None


def _bytes(run: Run | None) -> tuple[int | None, float | None, list[float], str]:
    """The longest length; MHA's bytes of a layer; CHAI's of each; why not, in words.

    Layers of a model are alike, so each has the same share of MHA's bytes. Of that, CHAI keeps V and the
    representatives' K. The sum of all layers must be what the live tensors had.
    """
    if run is None:
        return None, None, [], ""
    length = int(run.table.length.max())
    live = run.table[run.table.length == length].set_index("method").cache_bytes
    counts, heads = run.result["heads_kept"], int(run.result["heads"])
    full = float(live["mha"]) / len(counts)
    kept = [full * (k + heads) / (2 * heads) for k in counts]
    if not np.isclose(sum(kept), live["chai"], rtol=0.01):
        return length, None, [], "Query heads share keys here, so the bytes of a layer don't follow from its clusters."
    return length, full, kept, ""
