"""Benchmark rows: measured times beside the operations and bytes that arithmetic requires (:mod:`chai.costs`)."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from chai.methods.base import Method
from experiments.benchmarks._adapter import baseline, decode_bytes, layer_shape, prefill_flops

#: Implementations of multi-head attention that a method is compared with.
BASELINES = ("eager", "sdpa", "xformers")

#: Operations (prefill) or bytes (decode) needed with k clusters; with None, of the method itself.
Cost = Callable[[int | None], float]


def attention_cost(method: Method, model: PreTrainedModel, phase: str, kv_len: int, batch_size: int) -> Cost:
    """Return the cost of attention alone."""
    shape = layer_shape(method, model)
    if phase == "prefill":
        return lambda k: batch_size * shape.attention_flops(kv_len, k or shape.heads)
    return lambda k: batch_size * model.dtype.itemsize * shape.cache_entries(kv_len, k or shape.heads)


def layer_cost(method: Method, model: PreTrainedModel, phase: str, kv_len: int, batch_size: int) -> Cost:
    """Return the cost of a layer, whose weights are read once for all sequences."""
    shape = layer_shape(method, model)
    if phase == "prefill":
        return lambda k: batch_size * shape.prefill_flops(kv_len, k or shape.heads)

    def decode(k: int | None) -> float:
        k = k or shape.heads
        return model.dtype.itemsize * (shape.weights(k) + batch_size * shape.cache_entries(kv_len, k))

    return decode


def model_cost(method: Method, model: PreTrainedModel, phase: str, kv_len: int, batch_size: int) -> Cost:
    """Return the cost of the whole model: with all heads for any k, under the method for ``None``."""

    def cost(k: int | None) -> float:
        counted = method if k is None else baseline()
        if phase == "prefill":
            return batch_size * prefill_flops(counted, model, kv_len)
        return decode_bytes(counted, model, kv_len, batch_size)

    return cost


def summarize(
    part: str,
    phase: str,
    length: int,
    k: int | None,
    times: dict[str, list[float]],
    cost: Cost,
    peak: dict[str, float],
    num_heads: int,
) -> list[dict[str, Any]]:
    """Return one row for each implementation; docs/results.md describes the columns."""
    baselines = [name for name in times if name in BASELINES]
    best = min(baselines, key=lambda name: median(times[name]))
    unit, peak_rate = ("GFLOP/s", peak["gflop_per_s"]) if phase == "prefill" else ("GB/s", peak["gb_per_s"])
    rows = []
    for name, samples in times.items():
        is_baseline = name in baselines
        low, _, high = quantiles(samples, n=4) if len(samples) > 1 else samples * 3
        speedup = median(base / time for base, time in zip(times[best], samples, strict=True))
        full, needed = cost(num_heads), cost(num_heads if is_baseline else k)
        rate = needed / median(samples) / 1e6
        rows.append(
            {
                "part": part,
                "phase": phase,
                "length": length,
                "k": k,
                "implementation": name,
                "baseline": is_baseline,
                "ms": median(samples),
                "ms_p25": low,
                "ms_p75": high,
                "rounds": len(samples),
                "speedup": speedup,
                "best_baseline": best,
                "limit": full / needed,
                "of_limit": speedup * needed / full,
                "rate": rate,
                "rate_unit": unit,
                "of_peak": rate / peak_rate,
            }
        )
    return rows


def headline(frame: pd.DataFrame) -> dict[str, float]:
    """Return the method's speed-up at the longest length, by part and phase (and k)."""
    rows = frame[~frame.baseline & (frame.length == frame.length.max())]
    return {
        f"{row.part}_{row.phase}" + ("" if pd.isna(row.k) else f"_k{row.k}"): float(row.speedup)
        for row in rows.itertuples()
    }
