"""Figures of saved results: ``python -m analysis.figures --list``.

A figure is one module here (``fig<number>.py`` if it is one of the paper's) with ``TITLE``, ``QUERY`` (the runs that it
needs, and the command that makes one) and ``draw``, a function of :class:`analysis.results.runs.Results` that returns
the matplotlib figure and the plotted data, one row for each point. Code of several figures is in
:mod:`analysis.plotting`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType


def names() -> list[str]:
    """Return the names of all figures: those of the paper by number, fig2 before fig11, then the others."""
    files = (file.stem for file in Path(__file__).parent.glob("[!_]*.py"))
    numbers = {name: [int(number) for number in re.findall(r"\d+", name)] for name in files}
    return sorted(numbers, key=lambda name: (not numbers[name], numbers[name], name))


def load(name: str) -> ModuleType:
    """Import a figure's module; only when needed, so that an error in one does not affect the others."""
    return importlib.import_module(f"{__name__}.{name}")
