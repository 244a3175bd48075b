"""Finished perplexity runs, paired with the multi-head attention run of the same settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from analysis.results.files import SkippedRun, read_table
from analysis.results.runs import MissingRun, Results, Run, RunQuery

PERPLEXITY = RunQuery(
    "perplexity",
    fields=("task", "metrics", "savings", "n", "settings_id"),
    command="python run.py -m experiment=perplexity model=smollm2_135m method=mha,chai",
    small_command="python run.py -m experiment=perplexity model=tiny corpus=micro experiment.window=80 method=mha,chai",
)
COLUMNS = ("doc_id", "doc_hash", "tokens", "nats")
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class PairedRun:
    """A method's run beside that of multi-head attention."""

    run: Run
    corpus: str
    change: float  # nats per token
    low: float  # ends of its 95 % interval; nan for a single document
    high: float
    heads: float  # share of the heads whose scores are computed, mean of the layers
    saved: float  # share of the KV cache's bytes

    @property
    def perplexity(self) -> float:
        """Perplexity under the method."""
        return math.exp(self.run.result["metrics"]["nats_per_token"])


def paired_runs(results: Results) -> list[PairedRun]:
    """Return all runs that have a run of multi-head attention with the same settings (MissingRun: there are none)."""
    runs = results.runs(PERPLEXITY)
    baselines = {run.result["settings_id"]: run for run in runs if run.method == "mha"}
    pairs = []
    for run in runs:
        base = baselines.get(run.result["settings_id"])
        pair = results.attempt(run.folder, _pair, run, base) if base is not None else None
        if pair is not None:
            pairs.append(pair)
    if not pairs:
        raise (
            results.missing(PERPLEXITY)
            if not runs
            else MissingRun(
                "no perplexity run has a run of method=mha with the same settings",
                PERPLEXITY.command,
                model=results.model,
            )
        )
    results.used += [pair.run for pair in pairs]
    return pairs


def _pair(run: Run, base: Run) -> PairedRun:
    frames = [read_table(one.folder / "samples.parquet", COLUMNS) for one in (base, run)]
    change, low, high = paired_change(*frames)
    savings = run.result["savings"]
    try:
        heads = sum(savings["heads_kept"]) / len(savings["heads_kept"])
        saved = 1 - savings["kv_bytes"] / savings["kv_bytes_mha"]
        of_all = sum(base.result["savings"]["heads_kept"]) / len(base.result["savings"]["heads_kept"])
    except (KeyError, TypeError, ZeroDivisionError):
        raise SkippedRun("result.json has no numeric savings") from None
    return PairedRun(run, run.result["task"], change, low, high, heads / of_all, saved)


def paired_change(baseline: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float, float]:
    """Return the change of nats per token with the ends of its 95 % interval, documents as units.

    The mean is a ratio of sums over documents; its error is linearized, with n - 1 degrees of freedom.

    Raises:
        SkippedRun: The documents differ.
    """
    both = baseline.merge(other, on=["doc_id", "doc_hash", "tokens"], suffixes=("", "_other"))
    if not len(both) == len(baseline) == len(other):
        raise SkippedRun("its documents are not those of the run of multi-head attention")
    difference, tokens, n = (both.nats_other - both.nats).to_numpy(), float(both.tokens.sum()), len(both)
    mean = float(difference.sum()) / tokens
    if n < 2:
        return mean, math.nan, math.nan
    residual = difference - mean * both.tokens.to_numpy()
    half = float(student.ppf((1 + LEVEL) / 2, n - 1)) * float(np.sqrt((residual**2).sum() * n / (n - 1))) / tokens
    return mean, mean - half, mean + half
