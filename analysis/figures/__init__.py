"""Figures of saved results: ``python -m analysis.figures --list``.

A figure is one module here, ``fig<number>.py``, with ``TITLE``, ``QUERY`` (the runs that it needs, and the command that
makes one) and ``draw``, a function of :class:`analysis.results.runs.Results` that returns the matplotlib figure and the
plotted data, one row for each point. Code of several figures is in :mod:`analysis.plotting`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType


def names() -> list[str]:
    """Return the names of all figures by number: fig2 before fig11."""
    files = Path(__file__).parent.glob("fig*.py")
    return sorted((file.stem for file in files), key=lambda name: [int(n) for n in re.findall(r"\d+", name)] + [name])


def load(name: str) -> ModuleType:
    """Import a figure's module; only when needed, so that an error in one does not affect the others."""
    return importlib.import_module(f"{__name__}.{name}")
