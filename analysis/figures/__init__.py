"""Figures of saved results: ``python -m analysis.figures --list``.

A figure is one module here, ``fig<number>.py``, with ``TITLE``, ``QUERY`` (the runs that it needs, and the command that
makes one) and ``draw``. What several figures share is in :mod:`analysis.plotting`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Protocol, cast

import pandas as pd
from matplotlib.figure import Figure

from analysis.results.runs import Results, RunQuery


class FigureModule(Protocol):
    """A module of this package."""

    TITLE: str
    QUERY: RunQuery

    def draw(self, results: Results) -> tuple[Figure, pd.DataFrame]:
        """Return the figure and the plotted data, one row for each point."""


def names() -> list[str]:
    """Return the names of all figures by number: fig2 before fig11."""
    files = Path(__file__).parent.glob("fig*.py")
    return sorted((file.stem for file in files), key=lambda name: [int(n) for n in re.findall(r"\d+", name)] + [name])


def load(name: str) -> FigureModule:
    """Import a figure's module; only when needed, so that an error in one does not affect the others."""
    return cast(FigureModule, importlib.import_module(f"{__name__}.{name}"))
