"""Saved measurements of one question, and their means with 95 % intervals over the texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from scipy.stats import t as student

from analysis.results.files import read_table
from analysis.results.runs import MissingRun, Results, Run, RunQuery
from analysis.stats.intervals import LEVEL, Interval, quantile

RUNS = RunQuery(
    "ablations",
    fields=(
        "questions", "n", "tokens", "clusters", "heads", "corpus", "further", "first_scored", "sample_tokens", "dtype",
        "task",
    ),
    command="python run.py experiment=ablations model=smollm2_135m corpus=c4",
    small_command="python run.py experiment=ablations experiment.clusters=6 experiment.tokens=64 "
    "experiment.first_scored=16",
)  # fmt: skip
COLUMNS = ("question", "choice", "corpus", "text", "measure", "value")


@dataclass(frozen=True, eq=False)
class Answers:
    """The run that answers a question, and its rows.

    Attributes:
        question: Its name.
        run: The run.
        rows: Columns ``choice``, ``corpus``, ``text``, ``measure``, ``value``.
    """

    question: str
    run: Run
    rows: pd.DataFrame

    @property
    def choices(self) -> list[str]:
        """The choices in their order."""
        return list(dict.fromkeys(self.rows.choice))

    def values(self, choice: str, measure: str) -> pd.Series:
        """Return the values of each text, by corpus and number."""
        chosen = self.rows[(self.rows.choice == choice) & (self.rows.measure == measure)]
        return chosen.set_index(["corpus", "text"]).value

    def mean(self, choice: str, measure: str) -> Interval:
        """Return the mean over the texts."""
        return mean_interval(self.values(choice, measure).to_numpy())

    def difference(self, choice: str, base: str, measure: str) -> Interval:
        """Return the mean difference to another choice on the same texts."""
        first, second = self.values(choice, measure), self.values(base, measure)
        return mean_interval((first - second).dropna().to_numpy())


def find_answers(results: Results, question: str, rank: Callable[[Run], tuple[float, ...]]) -> Answers:
    """Return the answers of the run of the highest rank that asked a question.

    Raises:
        MissingRun: No finished run did.
    """
    runs = [run for run in results.runs(RUNS) if question in run.result["questions"]]
    for run in sorted(runs, key=rank, reverse=True):
        table = results.attempt(run.folder, read_table, run.folder / "samples.parquet", COLUMNS)
        if table is not None:
            rows = table[table.question == question].astype({"choice": str, "corpus": str, "measure": str})
            return Answers(question, run, rows.drop(columns="question"))
    raise MissingRun(
        f"no finished run of experiment=ablations in {results.root} has the question '{question}'; make one with: "
        f"{RUNS.command_for(results.model)}"
    )


def mean_interval(values: Sequence[float] | np.ndarray | pd.Series) -> Interval:
    """Return a mean and its 95 % interval by Student's t; without ends (NaN) for a single value."""
    array = np.asarray(values, dtype=float)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(student.ppf((1 + LEVEL) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> Interval:
    """Return Spearman's correlation with its 95 % interval (Bonett and Wright, 2000); NaN for constant values."""
    n = len(first)
    if n < 4 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Interval(math.nan, math.nan, math.nan)
    rho = float(spearmanr(first, second).statistic)
    half = quantile(LEVEL) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    centre = math.atanh(min(max(rho, -0.9999), 0.9999))
    return Interval(rho, math.tanh(centre - half), math.tanh(centre + half))
