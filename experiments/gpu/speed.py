"""How fast attention and the engine are on a GPU, as ordinary runs of ``experiment=latency``, and what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.gpu.report import Outcome

SHAPE = ("experiment=latency", "model=llama7b", "model.random_init=true", "model.dtype=bfloat16", "device=cuda")
ATTENTION = (*SHAPE, "model.architecture.num_hidden_layers=1", "method.clusters=4", "experiment.parts=[attention]")
MODEL = (*SHAPE, "experiment.parts=[engine]")
LEAST_CONTROL = 0.98
#: The paper's counts for LLaMA-7B, of which the conf of the model takes its default.
PAPER = "method.clusters=llama7b_params"


@dataclass(frozen=True)
class Figure:
    """A speedup over the best baseline that is asked of one row of a run, or the most that its baseline may take."""

    length: int
    least: float | None  # None: shown only
    k: int | None = None  # of attention alone


@dataclass(frozen=True)
class Measured:
    """One run, and what is asked of it."""

    name: str
    overrides: tuple[str, ...]
    figures: tuple[Figure, ...]
    most_over_limit: float | None = None  # of multi-head attention's time over that of reading its bytes once


def attention(phase: str, rows: int, figures: dict[int, dict[int, float]]) -> Measured:
    """Return a run of attention alone; figures by length and k."""
    lengths, counts = list(figures), list(dict.fromkeys(k for row in figures.values() for k in row))
    overrides = (
        *ATTENTION, f"experiment.phases=[{phase}]", f"experiment.lengths={lengths}".replace(" ", ""),
        f"experiment.clusters={counts}".replace(" ", ""), f"experiment.rows={rows}",
    )  # fmt: skip
    asked = tuple(Figure(length, least, k) for length, row in figures.items() for k, least in row.items())
    return Measured(f"attention, {phase}", overrides, asked)


def engine(phase: str, rows: int, clusters: str, figures: dict[int, float | None], **options: Any) -> Measured:
    """Return a run of the model in the engine; figures by length."""
    lengths = f"experiment.lengths={list(figures)}".replace(" ", "")
    overrides = (*MODEL, clusters, f"experiment.phases=[{phase}]", lengths, f"experiment.rows={rows}")
    name = (
        ("first" if phase == "prefill" else "next") + " token, " + ("k = 4" if clusters != PAPER else "paper's counts")
    )
    return Measured(name, overrides, tuple(Figure(length, least) for length, least in figures.items()), **options)


#: What was within reach of trial kernels on an H200 (docs/performance.md).
RUNS = (
    attention("decode", 1, {8192: {4: 1.40, 18: 1.12, 32: 0.98}, 32768: {4: 1.55, 18: 1.17, 32: 0.98}}),
    attention("decode", 32, {2048: {4: 1.60, 18: 1.15, 32: 0.98}}),
    attention(
        "prefill",
        1,
        {
            512: {4: 0.98, 18: 0.98, 32: 0.98},
            2048: {4: 0.98, 18: 0.98, 32: 0.98},
            8192: {4: 1.22, 18: 1.04, 32: 0.98},
            32768: {4: 1.30, 18: 1.10, 32: 0.98},
        },
    ),
    engine("prefill", 1, "method.clusters=4", {2048: 1.20}),
    engine("prefill", 1, PAPER, {2048: 1.12}),
    engine("decode", 1, "method.clusters=4", {2048: 1.12, 32768: 1.25}),
    engine("decode", 1, PAPER, {2048: None}),
    engine("decode", 16, "method.clusters=4", {2048: 1.30}, most_over_limit=1.35),
)


def judge(measured: Measured, folder: Path) -> Iterator[Outcome]:
    """Compare a complete run with what is asked of it."""
    frame = pd.read_parquet(folder / "measurements.parquet")
    rows = next(part.partition("=")[2] for part in measured.overrides if part.startswith("experiment.rows="))
    for figure in measured.figures:
        chosen = frame[(frame.length == figure.length) & (frame.role == "method")]
        chosen = chosen[chosen.k.isna() if figure.k is None else chosen.k == figure.k]
        if len(chosen) != 1:
            yield Outcome(measured.name, "not measured", "", False)
            continue
        row = chosen.iloc[0]
        found = f"{row.speedup:.2f} ({row.speedup_p25:.2f}-{row.speedup_p75:.2f}) of {row.best_baseline}"
        shape = f"{rows} x {figure.length}" + ("" if figure.k is None else f", k = {figure.k}")
        asked = "" if figure.least is None else f"{figure.least:.2f}, limit {row.limit:.2f}"
        holds = None if figure.least is None else bool(row.speedup >= figure.least)
        yield Outcome(f"{measured.name}, {shape}", f"{found}, {row.ms:.3g} ms", asked, holds)
    # The control: every head a cluster, in the engine the same work as multi-head attention.
    for row in frame[(frame.role == "control") & (frame.part == "engine")].itertuples():
        found, asked = f"{row.speedup:.2f} ({row.speedup_p25:.2f}-{row.speedup_p75:.2f})", f"{LEAST_CONTROL:.2f}"
        name = f"{measured.name.split(',')[0]}, k = H, {rows} x {row.length}"
        yield Outcome(name, found, asked, bool(row.speedup >= LEAST_CONTROL))
    if measured.most_over_limit is not None:
        baseline = frame[frame.role == "baseline"].iloc[0]
        ratio = 1 / baseline.of_peak
        yield Outcome(
            f"multi-head attention in the engine, {rows} x {baseline.length}",
            f"{ratio:.2f} of the time to read its bytes",
            f"at most {measured.most_over_limit:.2f}",
            bool(ratio <= measured.most_over_limit),
        )
