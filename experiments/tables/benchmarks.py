"""The tables of the benchmarks, read back from the results on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from experiments.runs.files import read_json
from experiments.tables.layout import make_table, print_table

LATENCY_LEGEND = (
    "Medians of interleaved rounds; ±: half the interquartile range, largest of the row. Gain: speed-up over the\n"
    "named best baseline. Limit: theoretical, from FLOPs (prefill) or bytes read (decode). Rate: required\n"
    "GFLOP (GF) or GB per second. Peak: the rate's share of a large matrix product's, or of reading memory's."
)
MEMORY_LEGEND = (
    "Cache: live keys and values. Formula: (n + H_kv) * D * tokens * bytes, n: KV heads kept. Allocated: with room\n"
    "to grow. Peak: the most that was alive at once beyond the weights while the last tokens were decoded."
)


def show_latency(folder: Path) -> None:
    """Print a row for each part, phase and length: every implementation's time, the speed-up and its limit."""
    result, frame = read_json(folder / "result.json"), pd.read_parquet(folder / "measurements.parquet")
    if result is None:
        return
    names = list(dict.fromkeys(frame.implementation))
    columns = ["Tokens", "k", *(f"{name} ms" for name in names), "±", "Gain", "Limit", "Rate", "Peak"]
    title = f"{result['model']}, {result['layers']} layers, {result['dtype']}, {result['device_name']}"
    table = make_table(title, ["Part"], columns, pad_edge=False)
    groups = list(frame.groupby(["part", "phase", "length", "k"], sort=False, dropna=False))
    order = {name: place for place, name in enumerate(dict.fromkeys(frame.part))}
    groups.sort(key=lambda group: (order[group[0][0]], group[0][1] != "prefill"))
    previous = None
    for (part, phase, length, k), group in groups:
        if previous is not None and previous != (part, phase):
            table.add_section()
        previous = (part, phase)
        by_name = {row.implementation: row for row in group.itertuples()}
        method = next((row for row in by_name.values() if not row.baseline), None)
        rated = method or next(row for row in by_name.values() if row.implementation == row.best_baseline)
        table.add_row(
            f"{part} {phase}",
            f"{length}",
            _counts(result["heads_kept"]) if pd.isna(k) else f"{k}",
            *(_milliseconds(by_name[name].ms) if name in by_name else "" for name in names),
            f"{100 * max((row.ms_p75 - row.ms_p25) / 2 / row.ms for row in by_name.values()):.0f} %",
            f"{method.speedup:.2f} {method.best_baseline}" if method else "",
            f"{method.limit:.2f}" if method and not pd.isna(method.limit) else "",
            _rate(rated),
            "" if pd.isna(rated.of_peak) else f"{100 * rated.of_peak:.0f} %",
        )
    legend = LATENCY_LEGEND
    if clustering := result.get("membership"):
        legend = (
            f"Clustering of all layers: {clustering['decide_ms']:.1f} ms; with the pass over the warm-up tokens: "
            f"{clustering['first_tokens_ms']:.1f} ms. Both are part of the model's prefill time.\n{legend}"
        )
    print_table(table, legend)


def show_memory(folder: Path) -> None:
    """Print a row for each length and method: bytes of the cache, by arithmetic, and the peak."""
    result, frame = read_json(folder / "result.json"), pd.read_parquet(folder / "measurements.parquet")
    if result is None:
        return
    table = make_table(
        f"KV cache of {result['model']}, {result['layers']} layers, {result['dtype']}, batch {result['batch_size']}",
        ["Method"],
        ["Tokens", "Cache MB", "Formula MB", "Saved", "Allocated MB", "Peak MB", "Peak / cache", "Decoded"],
        pad_edge=False,
    )
    for length, group in frame.groupby("length"):
        full = group[group.method == "mha"].cache_bytes.iloc[0]
        for row in group.itertuples():
            table.add_row(
                row.method,
                f"{length}",
                *(f"{value / 1e6:.2f}" for value in (row.cache_bytes, row.formula_bytes)),
                f"{100 * (1 - row.cache_bytes / full):.1f} %",
                *(f"{value / 1e6:.2f}" for value in (row.allocated_bytes, row.peak_bytes)),
                f"{row.peak_bytes / row.cache_bytes:.2f}",
                f"{row.steps}",
            )
        table.add_section()
    print_table(table, MEMORY_LEGEND)


def _rate(row: Any) -> str:
    """Return operations or bytes a second; empty where the needed number is unknown."""
    if pd.isna(row.rate):
        return ""
    return f"{row.rate:{'.0f' if row.rate >= 10 else '.1f'}} {row.rate_unit.replace('FLOP', 'F')}"


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _counts(heads: list[int]) -> str:
    """Return the heads of all layers in few characters: one number, or the mean of several."""
    return f"{heads[0]}" if len(set(heads)) == 1 else f"~{sum(heads) / len(heads):.1f}"
