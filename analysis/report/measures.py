"""Find our number for each claim of the paper in finished runs, with its interval, baseline and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.figures import fig9
from analysis.plotting import correlation
from analysis.plotting.style import TIMES, clusters, label
from analysis.results.benchmarks import LATENCY, MEMORY, chai_memory, times
from analysis.results.profiles import PROFILE, best_profile
from analysis.results.runs import RANDOM, MissingRun, Results, Run
from analysis.stats import Interval
from analysis.tables.cells import Cell, Table
from analysis.tables.layout import commands
from analysis.tables.specs import TABLES, task_name

MEMORY_AND_WEIGHTS = replace(MEMORY, columns=(*MEMORY.columns, "weights_bytes"))
HALF = ("float16", "bfloat16")
EXACT = "exact"
MISSING = "runs are missing"
PAPER_TABLES = tuple(name for name in TABLES if name != "micro")


@dataclass(frozen=True)
class Ours:
    """A measured number."""

    interval: Interval
    certainty: str  # what the interval accounts for
    runs: Sequence[Run]  # source of the number
    detail: str = ""  # task, layer or length; cluster counts
    baseline: str = "none"
    commands: tuple[str, ...] = ()  # measure what is missing of it

    @property
    def device(self) -> str:
        """Device and dtype; and that the weights are random, if they are."""
        run = self.runs[0]
        return ", ".join([run.device, run.dtype, *(["random weights"] if run.model.endswith(RANDOM) else [])])


@dataclass
class Source:
    """Runs and filled tables in which numbers are found."""

    results: Results
    tables: dict[str, Table]


def _exact(run: Run, value: float, detail: str = "", baseline: str = "none", certainty: str = EXACT) -> Ours:
    return Ours(Interval.exact(value), certainty, [run], detail, baseline)


def kv_saved(source: Source, model: str) -> Ours:
    """Return the share of the KV cache that CHAI saves at the longest length, %."""
    run = _memory(source, model)
    length = run.table.length.max()
    longest = run.table[run.table.length == length].set_index("method").cache_bytes
    saved = 100 * (1 - longest[run.method] / longest["mha"])
    return _exact(run, saved, f"{length:,} tokens; {clusters(run.result['heads_kept'])}", "MHA, live tensors")


def cache_size(source: Source, model: str, length: str) -> Ours:
    """Return MHA's KV cache, GB."""
    run = _memory(source, model, HALF)
    at = run.table[(run.table.method == "mha") & (run.table.length == int(length))].cache_bytes
    if at.empty:
        raise MissingRun(MISSING, f"{MEMORY.command} 'experiment.lengths=[{length}]'")
    return _exact(run, at.iloc[0] / 1e9, f"{int(length):,} tokens")


def weights_size(source: Source, model: str) -> Ours:
    """Return the size of the model's weights, GB."""
    run = _memory(source, model, HALF)
    return _exact(run, run.table.weights_bytes.iloc[0] / 1e9)


def cache_share(source: Source, model: str) -> Ours:
    """Return the share of MHA's KV cache in cache and weights together at the longest length, %."""
    run = _memory(source, model)
    row = run.table[run.table.method == "mha"].sort_values("length").iloc[-1]
    share = 100 * row.cache_bytes / (row.cache_bytes + row.weights_bytes)
    return _exact(run, share, f"{row.length:,} tokens, batch {run.result['batch_size']}")


def _memory(source: Source, model: str, dtypes: Sequence[str] = ()) -> Run:
    try:
        return chai_memory(source.results.of(model, with_random=True), MEMORY_AND_WEIGHTS, dtypes)
    except MissingRun:
        raise MissingRun(MISSING, MEMORY.command + (f" model.dtype={dtypes[0]}" if dtypes else "")) from None


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
    return Ours(interval, certainty, [run], detail, label(whole.implementation))


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
    """Return the newest latency run of CHAI."""
    return source.results.of(model, with_random=True).newest(LATENCY, lambda run: run.method == "chai")


def worst_loss(source: Source, model: str, tables: str) -> Ours:
    """Return CHAI's largest loss on any task of some tables, points."""
    cells: list[tuple[Table, Cell]] = []
    missing: list[str] = []
    for name in tables.split(","):
        table = source.tables[name]
        row = table.row_of("chai")
        changes = row.changes if row else []
        cells += [(table, cell) for cell in changes]
        if row is None or len(changes) < len(row.cells):
            missing += _commands_of(table, "CHAI")
    if not cells:
        raise MissingRun(MISSING, *missing)
    return _loss(cells, tuple(missing))


def loss(source: Source, model: str, table: str, row: str, task: str) -> Ours:
    """Return a method's loss on one task, points."""
    whole = source.tables[table]
    for one in whole.rows:
        if one.paper is not None and one.paper.label == row:
            for cell in one.changes:
                if cell.task == task:
                    return _loss([(whole, cell)])
    raise MissingRun(MISSING, *_commands_of(whole, row))


def _commands_of(table: Table, row: str) -> list[str]:
    """Return the commands that fill a row and MHA's; if only refused cells are missing, one that runs all again."""
    lines = [line for label, line in commands(table) if label in ("MHA", row)]
    return lines or [f"python run.py -m method=mha,chai model={table.model} task={table.spec.whole} force=true"]


def _loss(cells: Sequence[tuple[Table, Cell]], missing: tuple[str, ...] = ()) -> Ours:
    """Return the largest loss of some cells: the maximum of the estimates, and of each end of the intervals."""
    losses = [-cell.change.points for _, cell in cells if cell.change]
    worst = Interval(*(max(getattr(one, end) for one in losses) for end in ("value", "low", "high")))
    table, cell = cells[int(np.argmax([one.value for one in losses]))]
    scores = [score for _, cell in cells for score in cell.scores]
    n = sum(cell.change.n for _, cell in cells if cell.change)
    limits = [limit for _, cell in cells if cell.score and (limit := cell.score.config.get("limit"))]
    part = f", first {max(limits):,} items only" if limits else ""
    detail = f"{task_name(cell.task)}, {label(table.model)}{part}"
    certainty, runs = f"paired bootstrap over {n:,} items", [score.run for score in scores]
    return Ours(worst, certainty, runs, detail, "MHA, same items", missing)


def cluster_correlation(source: Source, model: str) -> Ours:
    """Return the correlation of two heads of a cluster in one text, the greatest mean of any layer."""
    profile = best_profile(source.results.of(model))
    layers, values, assignment = profile.clustered_layers, profile.sample_correlation, profile["assignment"]
    means = [correlation.within_and_between(values[layer], assignment[layer])[0] for layer in layers]
    if not means or np.isnan(means).all():
        raise MissingRun(MISSING, PROFILE.command)
    layer = layers[int(np.nanargmax(means))]
    detail = f"layer {layer}, {profile.clusters[layer]} clusters"
    return _exact(profile.run, float(np.nanmax(means)), detail, certainty="one text, as in the paper: no interval")


def settled_tokens(source: Source, model: str, changing: str) -> Ours:
    """Return the token from which on fewer than a share of the heads change clusters with the next token."""
    profile = best_profile(source.results.of(model))
    mean = profile["changes"][fig9.can_change(profile)].mean(axis=0)
    # The last token at which too many heads still change.
    late = np.flatnonzero(mean >= float(changing))
    settled = int(late[-1]) + 2 if len(late) else 1  # entry n - 1 is the change from n to n + 1 tokens
    detail = f"of up to {profile['agreement'].shape[1]:,} tokens"
    return _exact(profile.run, settled, detail, certainty=f"mean over {profile.samples:,} texts: no interval")


Measure = Callable[..., Ours]
MEASURES: dict[str, Measure] = {
    measure.__name__: measure
    for measure in (
        kv_saved, speedup, worst_loss, loss, cache_share, attention_share, cluster_correlation, settled_tokens,
        cache_size, weights_size,
    )
}  # fmt: skip
