"""Define the tables, and read the paper's numbers for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from analysis.results.files import read_csv

REPOSITORY = Path(__file__).resolve().parents[2]
PAPER = REPOSITORY / "results" / "paper"

TASKS = ("piqa", "hellaswag", "arc_challenge", "arc_easy", "boolq")
NAMES = {"piqa": "PIQA", "hellaswag": "HellaSwag", "arc_challenge": "ARC-c", "arc_easy": "ARC-e", "boolq": "BoolQ"}
MEAN = "mean"  # the column with the mean of the tasks


@dataclass(frozen=True)
class Spec:
    """A table."""

    name: str  # on the command line, and of the file with the paper's numbers
    title: str
    model: str  # default model; the paper's numbers are of this one
    tasks: tuple[str, ...]  # columns
    whole: str | None  # value of `task=` that runs exactly these tasks, if there is one
    mean: bool = False  # add a column with the mean of the tasks
    extras: bool = True  # add rows for methods and settings that the paper does not have
    profile: bool = False  # CHAI takes its counts from the head profile, as CHAI-static must
    other_tasks: bool = False  # the tasks are not those of the sweep that fills the table

    @property
    def columns(self) -> list[str]:
        """Tasks, and the mean if the table has it."""
        return [*self.tasks, *([MEAN] if self.mean else [])]

    def embedded(self) -> Spec:
        """Return the table for the embedded model: the same methods, on its own tasks, with their mean."""
        if self.model == EMBEDDED:
            return self
        tasks = tuple(f"micro_{task}" for task in self.tasks)
        whole = "micro" if tasks == MICRO_TASKS else None
        return replace(self, tasks=tasks, whole=whole, mean=True, other_tasks=True)


EMBEDDED = "tiny"
MICRO_TASKS = tuple(f"micro_{task}" for task in TASKS)
PRUNED_V = "Pruning V as well, LLaMA-7B (paper, Table 4)"
SPECS = (
    Spec("table1", "Accuracy on OPT-66B (paper, Table 1)", "opt66b", TASKS, "paper", profile=True),
    Spec("table2", "Accuracy on LLaMA-7B (paper, Table 2)", "llama7b", TASKS, "paper", profile=True),
    Spec("table3", "Accuracy on LLaMA-33B (paper, Table 3)", "llama33b", TASKS, "paper", profile=True),
    Spec("table4", PRUNED_V, "llama7b", ("arc_challenge", "piqa"), None, extras=False, profile=True),
    Spec("micro", "Accuracy of the embedded model", EMBEDDED, MICRO_TASKS, "micro", mean=True),
)
TABLES = {spec.name: spec for spec in SPECS}


@dataclass(frozen=True)
class PaperRow:
    """A row of one of the paper's tables."""

    label: str  # the paper's name of the method
    method: str  # our name of the method
    settings: dict[str, Any]  # hyper-parameters that a run must have to be compared with this row
    values: dict[str, Decimal]  # task -> score in % (multi-head attention) or change in points (other methods)
    source: str  # place in the paper
    note: str  # disagreement with another place in the paper; usually empty


def task_name(task: str) -> str:
    """Return the heading of a column."""
    return "Mean" if task == MEAN else NAMES.get(task.removeprefix("micro_"), task)


def paper_rows(name: str) -> list[PaperRow]:
    """Read the paper's rows of a table; empty for a table that the paper does not have."""
    path = PAPER / f"{name}.csv"
    if not path.exists():
        return []
    lines = read_csv(path)
    scores = {task: Decimal(text) for task, text in lines[0].items() if task in TASKS}
    rows = []
    for line in lines:
        values = {task: Decimal(line[task]) for task in scores}
        # The first line is multi-head attention: scores of other methods become changes against it.
        if line["method"] != "mha" and line["kind"] == "score":
            values = {task: value - scores[task] for task, value in values.items()}
        settings = dict(pair.split("=", 1) for pair in line["settings"].split())
        parsed = {key: yaml.safe_load(value) for key, value in settings.items()}
        rows.append(PaperRow(line["label"], line["method"], parsed, values, line["source"], line["note"]))
    return rows


@dataclass(frozen=True)
class Chance:
    """Score on a task that needs no reading of the question."""

    level: Decimal  # score in %
    how: str  # guessing at random, or always the most frequent answer
    n: int  # items


def chance_levels() -> dict[str, Chance]:
    """Read the chance level of each task of the paper (``results/paper/chance.csv``); empty without the file."""
    path = PAPER / "chance.csv"
    lines = read_csv(path) if path.exists() else []
    return {line["task"]: Chance(Decimal(line["chance"]), line["how"], int(line["n"])) for line in lines}


def at_chance(rows: Sequence[PaperRow]) -> dict[str, dict[str, Decimal]]:
    """Return the paper's own scores that are not above chance: by method, then task.

    A score is not above chance if it is less than two standard errors of a guess above it.
    """
    base = next((row.values for row in rows if row.method == "mha"), {})
    levels = chance_levels()
    found: dict[str, dict[str, Decimal]] = {}
    for row in rows:
        for task, value in row.values.items():
            score = value if row.method == "mha" else base[task] + value
            chance = levels.get(task)
            if chance is None:
                continue
            share = float(chance.level) / 100
            if float(score - chance.level) < 2 * 100 * (share * (1 - share) / chance.n) ** 0.5:
                found.setdefault(row.label, {})[task] = score
    return found
