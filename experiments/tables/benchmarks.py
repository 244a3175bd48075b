"""The tables of the benchmarks, read back from the results on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from experiments.runs.files import read_json
from experiments.tables.layout import make_table, print_table

#: Name of the control: the method with as many clusters as heads, in which nothing is clustered.
CONTROL = "control"
#: Fewer interleaved rounds than this are marked: their quartiles say little.
ENOUGH_ROUNDS = 9
#: Columns of the baselines, whose names are a kernel, ``_`` and one of these caches (none: stock).
CACHES = ("Stock", "Growing", "Static")
#: The kernel that has a column of its own.
PRODUCTS = "products"
#: Multi-head attention in the engine, whose part of a run has no other baseline.
ENGINE = "engine"

TIMES_LEGEND = (
    "Medians of interleaved rounds. Multi-head attention by its fastest kernel: Stock, on transformers'\n"
    "DynamicCache, which copies at every token; Growing, on this project's buffers; Static, on a StaticCache of\n"
    "this length; Products, by the method's own matrix products (on Growing in prefill, Static in decode); Engine,\n"
    "in chai.Engine, as the method in these rows.\n"
    "k = H: the control, the method with every head a cluster. Rate: required GFLOP (GF) or GB per second."
)
GAINS_LEGEND = (
    "Gain: speedup over the fastest baseline, median and quartiles of the ratios within rounds. k = H: the same of\n"
    "the control; * if 1 is outside its quartiles: the two differ in more than clustering. Limit: theoretical, from\n"
    "FLOPs (prefill) or bytes read (decode). Peak: the rate's share of a large matrix product's, or of reading\n"
    "memory's."
)
OLD_LEGEND = (
    "Measured by an earlier version, without the control k = H and without the growing and static caches:\n"
    "force=true repeats it."
)
MEMORY_LEGEND = (
    "Cache: live keys and values. Formula: (n + H_kv) * D * tokens * bytes, n: KV heads kept. Allocated: with room\n"
    "to grow. Peak: the most that was alive at once beyond the weights while the last tokens were decoded."
)


@dataclass(frozen=True)
class Case:
    """What was timed in the same rounds: the baselines, and of some methods the method and its control."""

    part: str
    phase: str
    length: int
    clusters: str  # k, or the mean of the layers
    baselines: pd.DataFrame
    best: Any  # row of the fastest baseline
    method: Any | None  # row
    control: Any | None  # row; the method's, where every head is a cluster


def show_latency(folder: Path) -> None:
    """Print the times of every part, phase and length, then the gains beside those of the control."""
    result, frame = read_json(folder / "result.json"), pd.read_parquet(folder / "measurements.parquet")
    if result is None:
        return
    is_old = "role" not in frame
    if is_old:
        frame = frame.assign(role=frame.baseline.map({True: "baseline", False: "method"}), speedup_p25=None)
    cases = latency_cases(frame, result)
    title = f"{result['model']}, {result['layers']} layers, {result['dtype']}, {result['device_name']}"
    title += f"; ms, {describe_rounds(frame.rounds)}"
    legend = TIMES_LEGEND
    if clustering := result.get("membership"):
        legend = (
            f"Clustering of all layers: {clustering['decide_ms']:.1f} ms; with the pass over the warm-up tokens: "
            f"{clustering['first_tokens_ms']:.1f} ms. Both are part of the model's prefill time.\n{legend}"
        )
    print_table(_times_table(cases, title, result["method"]), legend)
    if any(case.method for case in cases):
        gains = _gains_table(cases, f"{result['method']}: speedup over the fastest baseline")
        print_table(gains, f"{GAINS_LEGEND}\n{OLD_LEGEND}" if is_old else GAINS_LEGEND)


def latency_cases(frame: pd.DataFrame, result: dict[str, Any]) -> list[Case]:
    """Return the cases of a run in the order of the tables."""
    cases = []
    for (part, phase, length, k), group in frame.groupby(["part", "phase", "length", "k"], sort=False, dropna=False):
        roles = {row.role: row for row in group.itertuples() if row.role != "baseline"}
        baselines = group[group.role == "baseline"]
        best = next(row for row in baselines.itertuples() if row.implementation == row.best_baseline)
        method, control = roles.get("method"), roles.get("control")
        kept = set(result["heads_kept"]) if pd.isna(k) else {int(k)}
        if kept == {result["heads"]}:
            control = method
        clusters = _counts(result["heads_kept"]) if pd.isna(k) else f"{k}"
        cases.append(Case(part, phase, length, clusters, baselines, best, method, control))
    order = {name: place for place, name in enumerate(dict.fromkeys(frame.part))}
    return sorted(cases, key=lambda case: (order[case.part], case.phase != "prefill"))


def _times_table(cases: list[Case], title: str, method: str) -> Table:
    engine = ["Engine"] if any(case.part == ENGINE for case in cases) else []
    names = [*CACHES, "Products", *engine, *(["k = H", method] if any(case.method for case in cases) else [])]
    rows = []
    for case in cases:
        times = fastest(case.baselines)
        times |= {name: row.ms for name, row in (("k = H", case.control), (method, case.method)) if row is not None}
        times_of_row = [_milliseconds(times[name]) if name in times else "" for name in names]
        rows.append([*times_of_row, _rate(case.method or case.best)])
    return _case_table(cases, rows, title, [*names, "Rate"])


def _gains_table(cases: list[Case], title: str) -> Table:
    rows = []
    for case in cases:
        method, control, rated = case.method, case.control, case.method or case.best
        off = control is not None and not pd.isna(control.speedup_p25) and not is_one(control)
        rows.append(
            [
                case.best.implementation.replace("_", " "),
                _gain(method) if method else "",
                _gain(control) + ("*" if off else "") if control else "",
                f"{method.limit:.2f}" if method and not pd.isna(method.limit) else "",
                "" if pd.isna(rated.of_peak) else f"{100 * rated.of_peak:.0f} %",
            ]
        )
    return _case_table(cases, rows, title, ["Fastest", "Gain", "k = H", "Limit", "Peak"])


def _case_table(cases: list[Case], rows: list[list[str]], title: str, columns: list[str]) -> Table:
    """Return a table with a row for each case, and a section for each part and phase."""
    table = make_table(title, ["Part"], ["Tokens", "k", *columns], pad_edge=False)
    previous = None
    for case, row in zip(cases, rows, strict=True):
        if previous is not None and previous != (case.part, case.phase):
            table.add_section()
        previous = (case.part, case.phase)
        table.add_row(f"{case.part} {case.phase}", f"{case.length}", case.clusters, *row)
    return table


def describe_rounds(rounds: pd.Series) -> str:
    """Return e.g. ``9 to 45 rounds``; too few are marked."""
    least, most = rounds.min(), rounds.max()
    count = f"{least}" if least == most else f"{least} to {most}"
    few = f", too few for quartiles (at least {ENOUGH_ROUNDS})" if least < ENOUGH_ROUNDS else ""
    return f"{count} round{'s' if most > 1 else ''}{few}"


def is_one(control: Any) -> bool:
    """Whether the control's gain is 1 within its quartiles."""
    return bool(control.speedup_p25 <= 1 <= control.speedup_p75)


def fastest(baselines: pd.DataFrame) -> dict[str, float]:
    """Return the milliseconds of the fastest baseline in each column of the table."""
    found: dict[str, float] = {}
    for row in baselines.itertuples():
        kernel, _, cache = row.implementation.partition("_")
        column = kernel.capitalize() if kernel in (PRODUCTS, ENGINE) else cache.capitalize() or "Stock"
        found[column] = min(row.ms, found.get(column, row.ms))
    return found


def _gain(row: Any) -> str:
    """Return a speedup with its quartiles; results of earlier versions have none."""
    if pd.isna(row.speedup_p25):
        return f"{row.speedup:.2f}"
    return f"{row.speedup:.2f} ({row.speedup_p25:.2f}-{row.speedup_p75:.2f})"


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
                f"{row.cache_bytes / 1e6:.2f}",
                "" if pd.isna(row.formula_bytes) else f"{row.formula_bytes / 1e6:.2f}",
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
