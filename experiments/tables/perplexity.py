"""The table of perplexities, with the paired change against multi-head attention, from the results on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from scipy.stats import t as student

from experiments.runs.files import read_json
from experiments.tables.accuracy import Result, find_baseline
from experiments.tables.layout import make_table, print_table

LEGEND = (
    "Change: nats per token against the MHA run of the same settings, with its paired 95 % interval over documents\n"
    "(over windows, if the corpus is one document). KV saved: of the cache's live bytes. Heads: heads whose scores\n"
    "are computed, mean of the layers."
)


def show_perplexity(folders: list[Path], results_dir: Path) -> None:
    """Print a table of these runs, each below its MHA baseline where there is one."""
    rows: dict[Path, Result] = {}
    for folder in folders:
        result = read_json(folder / "result.json")
        if result is None:
            continue
        baseline = find_baseline(result, results_dir)
        if baseline is not None and baseline is not result:
            rows[_folder(baseline, results_dir)] = baseline
        rows[folder] = result
    if not rows:
        return
    first = next(iter(rows.values()))
    table = make_table(
        f"Perplexity of {first['model']}",
        ["Corpus", "Method"],
        ["Perplexity", "Change", "Bits/byte", "KV saved", "Heads", "Tokens"],
    )
    for folder, result in rows.items():
        metrics, savings = result["metrics"], result["savings"]
        table.add_row(
            result["task"],
            result["method"],
            f"{metrics['perplexity']:.2f}",
            _change(folder, result, results_dir),
            f"{metrics['bits_per_byte']:.4f}" if "bits_per_byte" in metrics else "",
            f"{100 * (1 - savings['kv_bytes'] / savings['kv_bytes_mha']):.1f} % {savings['kind']}",
            f"{sum(savings['heads_kept']) / len(savings['heads_kept']):.1f}",
            f"{result['n']:,}",
        )
    print_table(table, LEGEND)


def paired_change(baseline: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float, float]:
    """Return the change of nats per token and the ends of its 95 % interval.

    The unit is the document; the mean is a ratio of sums, whose error is linearized, with n - 1 degrees of freedom.

    Raises:
        ValueError: The documents differ.
    """
    both = baseline.merge(other, on=["doc_id", "doc_hash", "tokens"], suffixes=("", "_other"))
    if not len(both) == len(baseline) == len(other):
        raise ValueError("not the same documents")
    difference, tokens, n = both.nats_other - both.nats, both.tokens.sum(), len(both)
    mean = float(difference.sum() / tokens)
    if n < 2:
        return mean, math.nan, math.nan
    error = math.sqrt(float(((difference - mean * both.tokens) ** 2).sum()) * n / (n - 1)) / tokens
    half = float(student.ppf(0.975, n - 1)) * error
    return mean, mean - half, mean + half


def _folder(result: Result, results_dir: Path) -> Path:
    names = ("experiment", "model", "method", "task", "run_id")
    return results_dir.joinpath(*(str(result[name]) for name in names))


def _change(folder: Path, result: Result, results_dir: Path) -> str:
    if result["method"] == "mha":
        return ""
    baseline = find_baseline(result, results_dir)
    if baseline is None:
        return "no MHA run"
    try:
        frames = [pd.read_parquet(path / "samples.parquet") for path in (_folder(baseline, results_dir), folder)]
        mean, low, high = paired_change(*frames)
    except (OSError, ValueError):
        return "not comparable"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
