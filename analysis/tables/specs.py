"""Define the tables, and read the paper's numbers for them."""

from __future__ import annotations

from dataclasses import dataclass
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

    @property
    def columns(self) -> list[str]:
        """Tasks, and the mean if the table has it."""
        return [*self.tasks, *([MEAN] if self.mean else [])]


MICRO_TASKS = tuple(f"micro_{task}" for task in TASKS)
PRUNED_V = "Pruning V as well, LLaMA-7B (paper, Table 4)"
SPECS = (
    Spec("table1", "Accuracy on OPT-66B (paper, Table 1)", "opt66b", TASKS, "paper"),
    Spec("table2", "Accuracy on LLaMA-7B (paper, Table 2)", "llama7b", TASKS, "paper"),
    Spec("table3", "Accuracy on LLaMA-33B (paper, Table 3)", "llama33b", TASKS, "paper"),
    Spec("table4", PRUNED_V, "llama7b", ("arc_challenge", "piqa"), None, extras=False),
    Spec("micro", "Accuracy of the embedded model", "tiny", MICRO_TASKS, "micro", mean=True),
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
