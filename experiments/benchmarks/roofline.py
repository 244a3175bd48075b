"""Benchmark rows: measured times beside the operations and bytes that arithmetic requires (:mod:`chai.flops`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from chai.methods import baseline
from chai.methods.base import Method
from chai.patching.model_info import UncountedError
from experiments.tables.benchmarks import CONTROL


def required_work(
    method: Method, model: PreTrainedModel, batch_size: int, part: str, phase: str, kv_len: int, k: int | None
) -> float:
    """Return the FLOPs (prefill) or bytes (decode) that a part requires with k clusters a layer; NaN if not known."""
    if part in ("model", "engine"):
        # None counts the method itself, and any k multi-head attention.
        counted = method if k is None else baseline()
        if phase == "prefill":
            return batch_size * counted.prefill_flops(model, kv_len)
        return counted.decode_bytes(model, kv_len, batch_size)
    try:
        shape = method.layer_shape(model)
    except UncountedError:
        return math.nan
    if phase == "prefill":
        return batch_size * (shape.attention_flops if part == "attention" else shape.prefill_flops)(kv_len, k)
    # Weights are read once for all sequences.
    weights = shape.weights(k) if part == "layer" else 0
    return model.dtype.itemsize * (weights + batch_size * shape.cache_entries(kv_len, k))


def summarize(
    case: dict[str, Any],
    times: dict[str, list[float]],
    method: str,
    required: Callable[[int | None], float],
    peak: dict[str, float],
    num_heads: int,
) -> list[dict[str, Any]]:
    """Return a row for each implementation of a case (part, phase, length and k); docs/results.md lists the columns.

    Speedups are over the baseline with the smallest median, and are ratios of the times of one round.

    Args:
        case: Part, phase, length and k.
        times: Milliseconds of each round, of the method and its control, where they were timed, and of the baselines.
        method: Name of the method.
        required: Returns the :func:`required_work` of k clusters.
        peak: FLOPs and bytes per second of the machine.
        num_heads: Of the model.
    """
    roles = {name: {method: "method", CONTROL: "control"}.get(name, "baseline") for name in times}
    baselines = [name for name, role in roles.items() if role == "baseline"]
    best = min(baselines, key=lambda name: median(times[name]))
    unit, peak_rate = ("GFLOP/s", peak["gflop_per_s"]) if case["phase"] == "prefill" else ("GB/s", peak["gb_per_s"])
    rows = []
    for name, samples in times.items():
        low, _, high = quartiles(samples)
        speedup_low, speedup, speedup_high = quartiles(
            [base / time for base, time in zip(times[best], samples, strict=True)]
        )
        full, needed = required(num_heads), required(case["k"] if roles[name] == "method" else num_heads)
        rate = needed / median(samples) / 1e6
        rows.append(
            {
                **case,
                "implementation": name,
                "baseline": roles[name] == "baseline",
                "role": roles[name],
                "ms": median(samples),
                "ms_p25": low,
                "ms_p75": high,
                "rounds": len(samples),
                "speedup": speedup,
                "speedup_p25": speedup_low,
                "speedup_p75": speedup_high,
                "best_baseline": best,
                "limit": full / needed,
                "of_limit": speedup * needed / full,
                "rate": rate,
                "rate_unit": unit,
                "of_peak": rate / peak_rate,
            }
        )
    return rows


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile; of one sample, that sample."""
    low, _, high = quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return low, median(samples), high


def headline(frame: pd.DataFrame) -> dict[str, float]:
    """Return the speedups of the method and its control at the longest length, by part and phase (and k)."""
    rows = frame[~frame.baseline & (frame.length == frame.length.max())]
    return {
        ("control_" if row.role == "control" else "")
        + f"{row.part}_{row.phase}"
        + ("" if pd.isna(row.k) else f"_k{row.k}"): float(row.speedup)
        for row in rows.itertuples()
    }
