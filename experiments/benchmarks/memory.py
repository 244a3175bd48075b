"""``experiment=memory``: bytes of the K,V cache, and the peak while decoding, by sequence length (paper, Figure 11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from transformers import PreTrainedModel

from chai.cache import cache_bytes
from chai.costs import layer_shape
from chai.methods.base import Method
from chai.methods.mha import Mha
from experiments.benchmarks.harness import (
    ProbeOptions,
    Subject,
    fill,
    formula_bytes,
    peak_memory,
    random_tokens,
    run_probe,
)
from experiments.tables.benchmarks import show_memory


@dataclass
class Options(ProbeOptions):
    """``experiment.*``: see conf/experiment/memory.yaml."""

    steps: int = 96
    reserve: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; valid: 0 or more")


def run(config: DictConfig) -> int:
    """Measure, unless it is done; returns the exit code."""
    return run_probe(config, Options, _measure, show_memory)


def _measure(subject: Subject, options: Options) -> dict[str, Any]:
    """All lengths, multi-head attention beside the method."""
    model, methods = subject.model, {"mha": Mha()} | {subject.name: subject.method}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    frame = pd.DataFrame(
        {"method": name, "length": length, "weights_bytes": weights} | decode(model, method, length, options)
        for length in subject.lengths
        for name, method in methods.items()
    )
    subject.write(frame)
    longest = frame[frame.length == frame.length.max()].set_index("method")
    mine, full = longest.loc[subject.name], longest.loc["mha"]
    return {
        "metrics": {
            "kv_bytes": int(mine.cache_bytes),
            "kv_bytes_mha": int(full.cache_bytes),
            "kv_saved": float(1 - mine.cache_bytes / full.cache_bytes),
            "peak_over_cache": float(mine.peak_bytes / mine.cache_bytes),
        }
    }


def decode(model: PreTrainedModel, method: Method, length: int, options: Options) -> dict[str, Any]:
    """Bring a cache to ``length`` tokens, the last ``steps`` of them by decoding under observation.

    Returns:
        columns of a row: live, allocated and arithmetical bytes of the cache, peak bytes, tokens decoded.
    """
    steps = min(options.steps, length - 8)
    token = random_tokens(model, options.rows, 1)

    with method(model):
        cache = method.new_cache(model, reserve=length if options.reserve else 0)
        peak = peak_memory(
            model.device,
            lambda: fill(model, cache, options.rows, length - steps),
            lambda: model(token, past_key_values=cache, use_cache=True),
            steps,
        )
    live = cache_bytes(cache)
    counts = (method if method.saving == "real" else Mha()).heads_kept(model.config)  # a mask drops nothing
    return {
        "steps": steps,
        "cache_bytes": live,
        "allocated_bytes": getattr(cache, "nbytes_allocated", live),
        "formula_bytes": formula_bytes(cache, counts, layer_shape(model), model.dtype.itemsize, options.rows),
        "peak_bytes": peak,
    }
