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


#: Commands for a small input without a GPU, by experiment, where the figure's own command wants one.
WITHOUT_GPU = {
    "profile": "python run.py experiment=profile model=tiny",
    "accuracy": "python run.py -m paper=micro model=tiny",
}


def command(figure: FigureModule, model: str | None) -> str:
    """The command that makes a figure's input, for the wanted model if there is one (several: a command for each)."""
    if model is None:
        small = WITHOUT_GPU.get(figure.EXPERIMENT)
        return figure.COMMAND + (f" (without a GPU: {small})" if small else "")
    return "; ".join(_for_model(figure, name) for name in Results(Path(), model).models)


def _for_model(figure: FigureModule, model: str) -> str:
    base, random = model.removesuffix("-random"), model.endswith("-random")
    if base == "tiny" and figure.EXPERIMENT in WITHOUT_GPU:
        words = WITHOUT_GPU[figure.EXPERIMENT].split()
    else:
        words = figure.COMMAND.split()
    words = [word for word in words if not re.match(r"model[.=]", word)]
    return " ".join([*words, f"model={base}", *(["model.random_init=true"] if random else [])])
