"""Our numbers for the paper's claims about memory and time, from runs of the memory and latency experiments."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from analysis.plotting.style import TIMES, clusters, label
from analysis.report import conditions
from analysis.report.source import MISSING, Check, Ours, Source, exact
from analysis.results.benchmarks import LATENCY, MEMORY, times
from analysis.results.runs import MissingRun, Run
from analysis.stats import Interval

MEMORY_AND_WEIGHTS = replace(MEMORY, columns=(*MEMORY.columns, "weights_bytes"))


def kv_saved(source: Source, model: str) -> Ours:
    """Return the share of the KV cache that CHAI saves at the longest length, %."""
    run = _memory(source, model, conditions.with_own_counts, source.as_accuracy)
    length = run.table.length.max()
    longest = run.table[run.table.length == length].set_index("method").cache_bytes
    saved = 100 * (1 - longest[run.method] / longest["mha"])
    return exact(run, saved, f"{length:,} tokens; {clusters(run.result['heads_kept'])}", "MHA, live tensors")


def cache_size(source: Source, model: str, length: str) -> Ours:
    """Return MHA's KV cache, GB."""
    run = _memory(source, model)
    at = run.table[(run.table.method == "mha") & (run.table.length == int(length))].cache_bytes
    if at.empty:
        raise MissingRun(MISSING, f"{MEMORY.command} 'experiment.lengths=[{length}]'")
    return exact(run, at.iloc[0] / 1e9, f"{int(length):,} tokens")


def weights_size(source: Source, model: str) -> Ours:
    """Return the size of the model's weights, GB."""
    run = _memory(source, model)
    return exact(run, run.table.weights_bytes.iloc[0] / 1e9)


def cache_share(source: Source, model: str) -> Ours:
    """Return the share of MHA's KV cache in cache and weights together at the longest length, %."""
    run = _memory(source, model)
    row = run.table[run.table.method == "mha"].sort_values("length").iloc[-1]
    share = 100 * row.cache_bytes / (row.cache_bytes + row.weights_bytes)
    return exact(run, share, f"{row.length:,} tokens, batch {run.result['batch_size']}")


def _memory(source: Source, model: str, *checks: Check) -> Run:
    def usable(run: Run) -> bool:
        return run.method == "chai" and {"mha", "chai"} <= set(run.table.method)

    try:
        return source.newest(MEMORY_AND_WEIGHTS, model, usable, (conditions.of_16_bits, *checks))
    except MissingRun:
        raise MissingRun(MISSING, MEMORY.command) from None


def speedup(source: Source, model: str, phase: str, length: str) -> Ours:
    """Return how many times as fast as the best baseline the whole model is with CHAI."""
    run = latency_run(source, model)
    rows = times(run, phase)
    rows = rows[rows.length == int(length)]
    if rows.baseline.all():
        raise MissingRun(MISSING, f"{LATENCY.command} 'experiment.lengths=[{length}]'")
    row = rows[~rows.baseline].iloc[0]
    best = rows[rows.implementation == row.best_baseline].iloc[0]
    baseline = f"{label(row.best_baseline)}, theoretical speedup {row.limit:.2f}{TIMES}"
    interval, detail = ratio_interval(row.speedup, best, row), clusters(run.result["heads_kept"])
    return Ours(interval, f"from the quartiles of {row.rounds} rounds", [run], detail, baseline)


def attention_share(source: Source, model: str) -> Ours:
    """Return the share of MHA's attention in the whole model's time, %, of the phase where it is greater."""
    run = latency_run(source, model)
    longest = run.table.length.max()
    shares = []
    for phase in ("prefill", "decode"):
        # The fastest baseline of one layer's attention, and of the whole model.
        parts = [times(run, phase, part).sort_values("ms") for part in ("attention", "model")]
        parts = [rows[rows.baseline & (rows.length == longest)] for rows in parts]
        if all(len(rows) for rows in parts):
            attention, whole = (rows.iloc[0] for rows in parts)
            share = 100 * len(run.result["heads_kept"]) * attention.ms / whole.ms
            shares.append((ratio_interval(share, attention, whole), phase, whole))
    if not shares:
        raise MissingRun(MISSING, LATENCY.command)
    interval, phase, whole = max(shares, key=lambda one: one[0].value)
    detail = f"{phase}, {whole.length:,} tokens, batch {run.result['batch_size']}"
    certainty = f"from the quartiles of {whole.rounds} rounds"
    caveat = "attention alone took longer than the whole model with it" if interval.value > 100 else ""
    return Ours(interval, certainty, [run], detail, label(whole.implementation), caveat=caveat)


def ratio_interval(ratio: float, *medians: pd.Series) -> Interval:
    """Return a ratio of two medians with its 95 % interval, from the quartiles of each.

    A median of n rounds has a standard error of about 1.2533 sd / sqrt(n), and the quartiles of normal times are
    1.349 sd apart. The rounds of the two alternate, so what slows both down cancels out; that is not counted here, so
    the interval is rather too wide.
    """
    errors = [1.2533 * (row.ms_p75 - row.ms_p25) / 1.349 / math.sqrt(row.rounds) / row.ms for row in medians]
    spread = math.exp(1.96 * math.hypot(*errors))
    return Interval(ratio, ratio / spread, ratio * spread)


def latency_run(source: Source, model: str) -> Run:
    """Return the newest latency run of CHAI that counts."""
    checks = (conditions.of_16_bits, conditions.on_a_gpu, conditions.with_own_counts, source.as_accuracy)
    return source.newest(LATENCY, model, lambda run: run.method == "chai", checks)
