"""The tables at the end of a probe, read back from the results on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.runs.files import read_json
from experiments.system.console import console


def show_latency(folder: Path) -> None:
    """One row for each part, phase and length: every implementation's time, the speed-up and what limits it."""
    result, frame = read_json(folder / "result.json"), pd.read_parquet(folder / "measurements.parquet")
    if result is None:
        return
    names = list(dict.fromkeys(frame.implementation))
    kept = result["heads_kept"]
    table = _table(f"{result['model']}, {result['layers']} layers, {result['dtype']}, {result['device_name']}")
    table.add_column("Part", no_wrap=True)
    for column in ("Tokens", "k", *(f"{name} ms" for name in names), "±", "Gain", "Limit", "Rate", "Peak"):
        table.add_column(column, justify="right", no_wrap=True)
    groups = list(frame.groupby(["part", "phase", "length", "k"], sort=False, dropna=False))
    order = {name: place for place, name in enumerate(dict.fromkeys(frame.part))}
    groups.sort(key=lambda group: (order[group[0][0]], group[0][1] != "prefill"))
    before = None
    for (part, phase, length, k), group in groups:
        if before is not None and before != (part, phase):
            table.add_section()
        before = (part, phase)
        by_name = {row.implementation: row for row in group.itertuples()}
        own = next((row for row in by_name.values() if not row.baseline), None)
        shown = own or next(row for row in by_name.values() if row.implementation == row.best_baseline)
        table.add_row(
            f"{part} {phase}",
            f"{length}",
            _counts(kept) if pd.isna(k) else f"{k}",
            *(_milliseconds(by_name[name].ms) if name in by_name else "" for name in names),
            f"{100 * max((row.ms_p75 - row.ms_p25) / 2 / row.ms for row in by_name.values()):.0f} %",
            f"{own.speedup:.2f} {own.best_baseline}" if own else "",
            f"{own.limit:.2f}" if own and not pd.isna(own.limit) else "",
            _rate(shown),
            "" if pd.isna(shown.of_peak) else f"{100 * shown.of_peak:.0f} %",
        )
    console.print(table)
    membership = result.get("membership")
    if membership:
        console.print(
            f"Membership of all layers: {membership['decide_ms']:.1f} ms; pass over the first tokens with it: "
            f"{membership['first_tokens_ms']:.1f} ms. Both are part of the model's prefill time.",
            highlight=False,
        )
    console.print(
        "Medians of interleaved rounds; ±: half the distance of their quartiles, the widest of the row. Gain: against\n"
        "the best baseline, which is named. Limit: by operations (prefill) or bytes read (decode). Rate: needed\n"
        "operations (GF: 1e9) or bytes by time. Peak: its share of what a large product, or reading memory, reaches.",
        style="dim",
        highlight=False,
    )


def _rate(row: Any) -> str:
    """Operations or bytes a second; empty where it isn't known how many there must be."""
    if pd.isna(row.rate):
        return ""
    return f"{row.rate:{'.0f' if row.rate >= 10 else '.1f'}} {row.rate_unit.replace('FLOP', 'F')}"


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _counts(kept: list[int]) -> str:
    """Counts of all layers in few characters: one number, or the mean of several."""
    return f"{kept[0]}" if len(set(kept)) == 1 else f"~{sum(kept) / len(kept):.1f}"


def show_memory(folder: Path) -> None:
    """One row for each length and method: bytes of the cache, by arithmetic, and the peak."""
    result, frame = read_json(folder / "result.json"), pd.read_parquet(folder / "measurements.parquet")
    if result is None:
        return
    table = _table(
        f"K,V cache of {result['model']}, {result['layers']} layers, {result['dtype']}, {result['batch_size']} rows"
    )
    table.add_column("Method", no_wrap=True)
    for column in ("Tokens", "Cache MB", "Formula MB", "Saved", "Allocated MB", "Peak MB", "Peak / cache", "Decoded"):
        table.add_column(column, justify="right", no_wrap=True)
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
    console.print(table)
    console.print(
        "Cache: live keys and values. Formula: (n + H) * D * tokens * bytes, n key heads kept. Allocated: with room\n"
        "to grow. Peak: the most that was alive at once beyond the weights while the last tokens were decoded.",
        style="dim",
        highlight=False,
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
