"""The common look of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.system.console import console


def make_table(title: str, text_columns: Sequence[str], number_columns: Sequence[str], **style: Any) -> Table:
    """Return an empty table, its text columns on the left, its numbers aligned to the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), **style)
    for column in text_columns:
        table.add_column(column, no_wrap=True)
    for column in number_columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_table(table: Table, legend: str) -> None:
    """Print a table with its legend below."""
    console.print(table)
    console.print(legend, style="dim", highlight=False)
