"""Our number for each claim of the paper: found in finished runs, with its interval, baseline and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis import profiles
from analysis.figures import _correlation, _latency, _look, _maps, _profile, fig9, fig11
from analysis.report._verdict import Interval
from analysis.saved import MissingRun, Results, Run
from analysis.tables._cells import Cell, Row, Table
from analysis.tables._layout import commands
from analysis.tables._specs import TABLES, task_name

MEMORY_COLUMNS = (*fig11.COLUMNS, "weights_bytes")
HALF = ("float16", "bfloat16")
EXACT = "exact"


class Missing(Exception):
    """What ours is computed from isn't there; the commands make it."""

    def __init__(self, *commands: str):
        super().__init__("; ".join(commands))
        self.commands = commands


@dataclass(frozen=True)
class Ours:
    """A measured number.

    Attributes:
        interval: the estimate with its ends.
        certainty: what the interval is of.
        baseline: what it is compared with.
        device: where it was measured, with the type of number.
        runs: it is computed from.
        detail: which task, layer or length; cluster counts.
        commands: that measure what is missing of it.
    """

    interval: Interval
    certainty: str
    baseline: str
    device: str
    runs: Sequence[Run]
    detail: str = ""
    commands: tuple[str, ...] = ()


@dataclass
class Source:
    """Where numbers are found.

    Attributes:
        results: the results folder, narrowed to the paper's part.
        tables: the paper's tables, filled.
    """

    results: Results
    tables: dict[str, Table] = field(default_factory=dict)

    def of(self, model: str) -> Results:
        """Runs of a model, or of its shape with random weights."""
        return self.results.of(f"{model},{model}-random")


def kv_saved(source: Source, model: str) -> Ours:
    """Share of the K,V bytes that CHAI saves at the longest length, %."""
    run, rows = _memory(source, model)
    longest = rows[rows.length == rows.length.max()].set_index("method").cache_bytes
    saved = 100 * (1 - longest[run.method] / longest["mha"])
    detail = f"{rows.length.max():,} tokens; {_look.clusters(run.result['heads_kept'])}"
    return Ours(Interval.exact(saved), EXACT, "MHA, live tensors", _where(run), [run], detail)


def cache_size(source: Source, model: str, length: str) -> Ours:
    """MHA's K,V cache, GB."""
    run, rows = _memory(source, model, HALF)
    at = rows[(rows.method == "mha") & (rows.length == int(length))].cache_bytes
    if at.empty:
        raise Missing(f"{fig11.COMMAND} 'experiment.lengths=[{length}]'")
    return Ours(Interval.exact(at.iloc[0] / 1e9), EXACT, "none", _where(run), [run], f"{int(length):,} tokens")


def weights_size(source: Source, model: str) -> Ours:
    """The model's weights, GB."""
    run, rows = _memory(source, model, HALF)
    return Ours(Interval.exact(rows.weights_bytes.iloc[0] / 1e9), EXACT, "none", _where(run), [run])


def cache_share(source: Source, model: str) -> Ours:
    """MHA's K,V cache in cache and weights together at the longest length, %."""
    run, rows = _memory(source, model)
    row = rows[rows.method == "mha"].sort_values("length").iloc[-1]
    share = 100 * row.cache_bytes / (row.cache_bytes + row.weights_bytes)
    detail = f"{row.length:,} tokens, batch {run.result['batch_size']}"
    return Ours(Interval.exact(share), EXACT, "none", _where(run), [run], detail)


def _memory(source: Source, model: str, dtypes: Sequence[str] = ()) -> tuple[Run, pd.DataFrame]:
    """The newest memory run of CHAI and its rows."""

    def usable(run: Run) -> bool:
        both = run.method == "chai" and {"mha", "chai"} <= set(run.table.method)
        return both and (not dtypes or run.result["dtype"] in dtypes)

    try:
        run = source.of(model).newest(fig11.EXPERIMENT, MEMORY_COLUMNS, fig11.FIELDS, usable)
    except MissingRun:
        raise Missing(fig11.COMMAND + (f" model.dtype={dtypes[0]}" if dtypes else "")) from None
    return run, run.table


def speedup(source: Source, model: str, phase: str, length: str) -> Ours:
    """How many times as fast as the best baseline the whole model is with CHAI."""
    run, rows = _latency_run(source, model)
    rows = rows[(rows.part == "model") & (rows.phase == phase) & (rows.length == int(length))]
    own = rows[~rows.baseline]
    if own.empty:
        raise Missing(f"{_latency.COMMAND} 'experiment.lengths=[{length}]'")
    row = own.iloc[0]
    best = rows[rows.implementation == row.best_baseline].iloc[0]
    low, high = ratio_ends(row.speedup, best, row)
    baseline = f"{_look.label(row.best_baseline)}, limit by arithmetic {row.limit:.2f}{_look.TIMES}"
    detail = _look.clusters(run.result["heads_kept"])
    certainty = f"from the quartiles of {row.rounds} rounds"
    return Ours(Interval(row.speedup, low, high), certainty, baseline, _where(run), [run], detail)


def attention_share(source: Source, model: str) -> Ours:
    """Time of MHA's attention in the whole model's, %, the greater of the two phases at the longest length."""
    run, rows = _latency_run(source, model)
    rows = rows[rows.baseline & (rows.length == rows.length.max())]
    found = []
    for phase in ("prefill", "decode"):
        parts = [rows[(rows.part == part) & (rows.phase == phase)].sort_values("ms") for part in ("attention", "model")]
        if all(len(part) for part in parts):
            attention, whole = (part.iloc[0] for part in parts)
            value = 100 * len(run.result["heads_kept"]) * attention.ms / whole.ms
            found.append((value, *ratio_ends(value, attention, whole), phase, whole))
    if not found:
        raise Missing(_latency.COMMAND)
    value, low, high, phase, whole = max(found, key=lambda one: one[0])
    detail = f"{phase}, {whole.length:,} tokens, batch {run.result['batch_size']}"
    certainty = f"from the quartiles of {whole.rounds} rounds"
    return Ours(Interval(value, low, high), certainty, _look.label(whole.implementation), _where(run), [run], detail)


def ratio_ends(ratio: float, *times: pd.Series) -> tuple[float, float]:
    """Ends of the 95 % interval of a ratio of two medians, from the quartiles of each.

    A median of n rounds has a standard error of about 1.2533 sd / sqrt(n), and the quartiles of normal times are
    1.349 sd apart. The rounds of the two alternate, so what slows both down cancels out; that is not counted here, so
    the interval is rather too wide.
    """
    errors = [1.2533 * (row.ms_p75 - row.ms_p25) / 1.349 / math.sqrt(row.rounds) / row.ms for row in times]
    spread = math.exp(1.96 * math.hypot(*errors))
    return ratio / spread, ratio * spread


def _latency_run(source: Source, model: str) -> tuple[Run, pd.DataFrame]:
    try:
        run = source.of(model).newest(
            _latency.EXPERIMENT, _latency.COLUMNS, _latency.FIELDS, usable=lambda run: run.method == "chai"
        )
    except MissingRun:
        raise Missing(_latency.COMMAND) from None
    return run, run.table


def worst_loss(source: Source, model: str, tables: str) -> Ours:
    """CHAI's largest loss of any task of some tables, points."""
    cells: list[tuple[Table, Cell]] = []
    wanted: list[str] = []
    for name in tables.split(","):
        table = source.tables[name]
        row = chai_row(table)
        found = [cell for cell in row.cells if cell.change] if row else []
        cells += [(table, cell) for cell in found]
        if row is None or len(found) < len(row.cells):
            wanted += [line for label, line in commands(table) if label in ("MHA", "CHAI")] or [_again(table)]
    if not cells:
        raise Missing(*wanted)
    return _loss(cells, tuple(wanted))


def _again(table: Table) -> str:
    """Where cells are refused: everything of CHAI and MHA under the same conditions."""
    return f"python run.py -m method=mha,chai model={table.model} task={table.spec.whole} force=true"


def chai_row(table: Table, method: str = "chai") -> Row | None:
    """CHAI (or another method) with its defaults; else with the settings that have the most tasks."""
    rows = [row for row in table.rows if row.method == method]
    return max(rows, key=lambda row: (not row.settings, len(row.tasks("done"))), default=None)


def loss(source: Source, model: str, table: str, row: str, task: str) -> Ours:
    """A method's loss on one task, points."""
    whole = source.tables[table]
    for one in whole.rows:
        if one.paper is not None and one.paper.label == row:
            for cell in one.cells:
                if cell.task == task and cell.change:
                    return _loss([(whole, cell)], ())
    lines = [line for label, line in commands(whole) if label in ("MHA", row)]
    raise Missing(*(lines or [_again(whole)]))


def _loss(cells: Sequence[tuple[Table, Cell]], wanted: tuple[str, ...]) -> Ours:
    changes = [(-100 * c.change.difference, -100 * c.change.high, -100 * c.change.low) for _, c in cells if c.change]
    value, low, high = (max(ends) for ends in zip(*changes, strict=True))
    table, cell = cells[int(np.argmax([change[0] for change in changes]))]
    runs = [score.run for _, cell in cells for score in (cell.score, cell.baseline) if score]
    n = sum(cell.change.n for _, cell in cells if cell.change)
    device = _where(runs[0])
    limits = [limit for _, cell in cells if cell.score and (limit := cell.score.config.get("limit"))]
    part = f", first {max(limits):,} items only" if limits else ""
    detail = f"{task_name(cell.task)}, {_look.label(table.model)}{part}"
    certainty = f"paired bootstrap over {n:,} items"
    return Ours(Interval(value, low, high), certainty, "MHA, same items", device, runs, detail, wanted)


def cluster_correlation(source: Source, model: str) -> Ours:
    """Correlation of two heads of a cluster in one text, the greatest mean of any layer."""
    profile = _profiled(source, model)
    sample = profile["sample_correlation"][_maps.SAMPLE]
    means = [
        _correlation.within_and_between(correlation, assignment)[0]
        for correlation, assignment, k in zip(sample, profile["assignment"], profile.clusters, strict=True)
        if 1 < k < profile.heads
    ]
    if not means or np.isnan(means).all():
        raise Missing(_profile.COMMAND)
    layers = [layer for layer, k in enumerate(profile.clusters) if 1 < k < profile.heads]
    layer = layers[int(np.nanargmax(means))]
    detail = f"layer {layer}, {profile.clusters[layer]} clusters"
    value = Interval.exact(float(np.nanmax(means)))
    return Ours(value, "one text, as in the paper: no interval", "none", _where(profile.run), [profile.run], detail)


def settled_tokens(source: Source, model: str, changing: str) -> Ours:
    """Tokens from which on fewer than a share of the heads change clusters with the next token."""
    profile = _profiled(source, model)
    mean = profile["changes"][fig9.can_change(profile)].mean(axis=0)
    late = np.flatnonzero(mean >= float(changing))
    settled = int(late[-1]) + 2 if len(late) else 1  # entry n - 1 is the change from n to n + 1 tokens
    samples = profile.about["corpus"]["samples"]
    detail = f"of up to {profile['agreement'].shape[1]:,} tokens"
    certainty = f"mean over {samples:,} texts: no interval"
    return Ours(Interval.exact(settled), certainty, "none", _where(profile.run), [profile.run], detail)


def _profiled(source: Source, model: str) -> profiles.Profile:
    try:
        return profiles.best(source.results.of(model))
    except MissingRun:
        raise Missing(_profile.COMMAND) from None


def _where(run: Run) -> str:
    """Device and type of number; and that the weights are random, where they are."""
    words = [run.device, str(run.result.get("dtype", "unknown dtype"))]
    return ", ".join([*words, *(["random weights"] if run.model.endswith("-random") else [])])


Measure = Callable[..., Ours]
MEASURES: dict[str, Measure] = {
    measure.__name__: measure
    for measure in (
        kv_saved, speedup, worst_loss, loss, cache_share, attention_share, cluster_correlation, settled_tokens,
        cache_size, weights_size,
    )
}  # fmt: skip
PAPER_TABLES = tuple(name for name in TABLES if name != "micro")
