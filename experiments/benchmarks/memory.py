"""``experiment=memory``: bytes of the KV cache, and the peak while decoding, by sequence length (paper, Figure 11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from transformers import PreTrainedModel

from chai.cache import allocated_bytes, cache_bytes
from chai.methods import baseline
from chai.methods.base import Method
from experiments.benchmarks import harness
from experiments.benchmarks.harness import BenchmarkContext, BenchmarkOptions
from experiments.runs.experiment import require_minimum
from experiments.tables.benchmarks import show_memory


@dataclass
class Options(BenchmarkOptions):
    """``experiment.*``: see conf/experiment/memory.yaml."""

    steps: int = 96
    reserve: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_minimum(self, steps=0)


def run(config: DictConfig) -> int:
    """Measure, unless the run is complete; return the exit code."""
    return harness.run_benchmark(config, Options, measure, show_memory)


def measure(context: BenchmarkContext[Options]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure all lengths, multi-head attention beside the method."""
    model, methods = context.model, {"mha": baseline()} | {context.name: context.method}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    frame = pd.DataFrame(
        {"method": name, "length": length, "weights_bytes": weights} | decode(model, method, length, context.options)
        for length in context.lengths
        for name, method in methods.items()
    )
    longest = frame[frame.length == frame.length.max()].set_index("method")
    row, mha = longest.loc[context.name], longest.loc["mha"]
    metrics = {
        "kv_bytes": int(row.cache_bytes),
        "kv_bytes_mha": int(mha.cache_bytes),
        "kv_saved": float(1 - row.cache_bytes / mha.cache_bytes),
        "peak_over_cache": float(row.peak_bytes / row.cache_bytes),
    }
    return frame, {"metrics": metrics}


def decode(model: PreTrainedModel, method: Method, length: int, options: Options) -> dict[str, Any]:
    """Fill a cache with ``length`` tokens, the last ``steps`` of them by decoding while memory is profiled."""
    steps = min(options.steps, length - 8)
    token = harness.random_tokens(model, options.rows, 1)
    with method(model):
        cache = method.new_cache(model, reserve=length if options.reserve else 0)
        peak = harness.peak_memory(
            model.device,
            lambda: harness.fill_cache(model, method, cache, options.rows, length - steps),
            lambda: model(token, past_key_values=cache, use_cache=True),
            steps,
        )
    return {
        "steps": steps,
        "cache_bytes": cache_bytes(cache),
        "allocated_bytes": allocated_bytes(cache),
        "formula_bytes": method.expected_cache_bytes(model, cache),
        "peak_bytes": peak,
    }
