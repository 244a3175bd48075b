"""The table of ``make gpu``: a row for each check, what was found and what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.tables.layout import make_table, print_table


@dataclass(frozen=True)
class Outcome:
    """One check: what was found, what is asked, and whether it holds (``None``: only shown)."""

    name: str
    found: str
    asked: str
    holds: bool | None


def show(outcomes: Sequence[Outcome], title: str, legend: str) -> None:
    """Print the table."""
    table = make_table(title, ["Check"], ["Found", "Asked", "Holds"], pad_edge=False)
    for outcome in outcomes:
        holds = {True: "yes", False: "NO", None: ""}[outcome.holds]
        table.add_row(outcome.name, outcome.found, outcome.asked, holds)
    print_table(table, legend)
