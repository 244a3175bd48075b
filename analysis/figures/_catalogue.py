"""The figures there are, by file name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Protocol, cast

import pandas as pd
from matplotlib.figure import Figure

from analysis.saved import Results


class FigureModule(Protocol):
    """What a figure's file has."""

    TITLE: str
    EXPERIMENT: str
    COMMAND: str

    def draw(self, results: Results) -> tuple[Figure, pd.DataFrame]:
        """The figure and the plotted data, one row for each point."""


def names() -> list[str]:
    """Every figure, numbers in order: fig2 before fig11."""
    files = Path(__file__).parent.glob("[!_]*.py")
    return sorted((file.stem for file in files), key=lambda name: [int(n) for n in re.findall(r"\d+", name)] + [name])


def load(name: str) -> FigureModule:
    """The figure's module, imported only now, so that one figure's mistake is no other's."""
    return cast(FigureModule, importlib.import_module(f"{__package__}.{name}"))


def command(figure: FigureModule, model: str | None) -> str:
    """The command that makes a figure's input, for the wanted model if there is one."""
    if model is None:
        return figure.COMMAND
    base, random = model.removesuffix("-random"), model.endswith("-random")
    words = [word for word in figure.COMMAND.split() if not re.match(r"model[.=]", word)]
    return " ".join([*words, f"model={base}", *(["model.random_init=true"] if random else [])])
