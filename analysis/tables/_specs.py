"""What each table holds, and the paper's numbers for it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PAPER = REPOSITORY / "results" / "paper"

TASKS = ("piqa", "hellaswag", "arc_challenge", "arc_easy", "boolq")
NAMES = {"piqa": "PIQA", "hellaswag": "HellaSwag", "arc_challenge": "ARC-c", "arc_easy": "ARC-e", "boolq": "BoolQ"}
MEAN = "mean"  # the column that is no task


@dataclass(frozen=True)
class Spec:
    """A table.

    Attributes:
        title: its heading.
        model: whose runs it shows unless another is asked for; the paper's numbers are this one's.
        tasks: its columns.
        whole: the ``task=`` that runs them all, if there is one for just these.
        mean: whether the mean of the tasks is a column too.
        extras: whether methods and settings that the paper doesn't have are rows too.
    """

    title: str
    model: str
    tasks: tuple[str, ...]
    whole: str | None
    mean: bool = False
    extras: bool = True


TABLES = {
    "table1": Spec("Accuracy on OPT-66B (paper, Table 1)", "opt66b", TASKS, "paper"),
    "table2": Spec("Accuracy on LLaMA-7B (paper, Table 2)", "llama7b", TASKS, "paper"),
    "table3": Spec("Accuracy on LLaMA-33B (paper, Table 3)", "llama33b", TASKS, "paper"),
    "table4": Spec(
        "Pruning V as well, LLaMA-7B (paper, Table 4)", "llama7b", ("arc_challenge", "piqa"), None, extras=False
    ),
    "micro": Spec(
        "Accuracy of the embedded model", "tiny", tuple(f"micro_{task}" for task in TASKS), "micro", mean=True
    ),
}


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper.

    Attributes:
        label: what the paper calls it.
        method: our name of the method.
        settings: hyper-parameters that a run of ours must have to be compared with it.
        values: of each task, with the digits that are printed: the score in % for multi-head attention, the change
            against that in points for the others.
        source: where in the paper.
        note: what doesn't agree with another place there; mostly empty.
    """

    label: str
    method: str
    settings: dict[str, Any]
    values: dict[str, Decimal]
    source: str
    note: str


def task_name(task: str) -> str:
    """What a column is called."""
    return "Mean" if task == MEAN else NAMES.get(task.removeprefix("micro_"), task)


def paper_rows(name: str) -> list[PaperRow]:
    """The paper's rows of a table; none for a table that the paper doesn't have."""
    path = PAPER / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    scores = {task: Decimal(text) for task, text in lines[0].items() if task in TASKS}
    rows = []
    for line in lines:
        values = {task: Decimal(line[task]) for task in scores}
        if line["method"] != "mha" and line["kind"] == "score":
            values = {task: value - scores[task] for task, value in values.items()}
        settings = dict(pair.split("=", 1) for pair in line["settings"].split())
        parsed = {key: yaml.safe_load(value) for key, value in settings.items()}
        rows.append(PaperRow(line["label"], line["method"], parsed, values, line["source"], line["note"]))
    return rows
