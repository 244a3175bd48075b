"""Colours, markers and names of methods and models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from analysis.results.runs import RANDOM, Run, base_name
from analysis.tables.settings import METHODS

STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "legend.fontsize": 7.5, "figure.titlesize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6,
    "lines.linewidth": 1.4, "lines.markersize": 5, "legend.frameon": False, "legend.handlelength": 2.6,
    "legend.labelspacing": 0.35,
    "pdf.fonttype": 42,  # text stays text in the PDF
}  # fmt: skip

LINE = 102  # characters of a heading that fit into a page's width
INK, GREY = "#222222", "#777777"
TIMES = "\N{MULTIPLICATION SIGN}"
#: Okabe-Ito colours, distinct for colour-blind readers; the markers are distinct without colour.
LOOKS: dict[str, dict[str, Any]] = {
    "mha": {"color": "#0072B2", "marker": "o"},
    "sdpa": {"color": "#0072B2", "marker": "o"},
    "eager": {"color": "#E69F00", "marker": "s"},
    "xformers": {"color": "#CC79A7", "marker": "v"},
    "growing_cache": {"color": "#009E73", "marker": "^"},
    "static_cache": {"color": "#CC79A7", "marker": ">"},
    "products": {"color": "#56B4E9", "marker": "<"},
    "control": {"color": "#777777", "marker": "x"},
    "chai": {"color": "#D55E00", "marker": "D", "markersize": 4.5},
    "chai_static": {"color": "#D55E00", "marker": "D", "markersize": 4.5, "markerfacecolor": "white"},
    "chai_qkv": {"color": "#D55E00", "marker": "X", "markersize": 6},
    "chai_output": {"color": "#D55E00", "marker": "P", "markersize": 6},
    "static": {"color": "#CC79A7", "marker": "v"},
    "random": {"color": "#777777", "marker": "s", "markersize": 4.5},
    "dejavu": {"color": "#009E73", "marker": "^"},
    "spatten": {"color": "#56B4E9", "marker": "p", "markersize": 6},
}
#: For series beside the main ones.
EXTRA: tuple[dict[str, Any], ...] = (
    {"color": "#009E73", "marker": "^"},
    {"color": "#56B4E9", "marker": "<"},
    {"color": "#CC79A7", "marker": ">"},
)
PAPER: dict[str, Any] = {"color": INK, "linestyle": ":", "marker": ".", "markersize": 3}
LABELS = {
    **METHODS, "sdpa": "SDPA", "xformers": "xFormers", "control": "k = H (control)",
    "growing_cache": "growing cache", "static_cache": "StaticCache", "products": "products",
    "eager_growing": "eager, growing cache", "sdpa_growing": "SDPA, growing cache",
    "eager_static": "eager, StaticCache", "sdpa_static": "SDPA, StaticCache",
    "products_growing": "products, growing cache", "products_static": "products, StaticCache",
    "llama7b": "LLaMA-7B", "llama2_7b": "Llama-2-7B", "llama3_8b": "Llama-3-8B", "llama33b": "LLaMA-33B",
    "opt66b": "OPT-66B", "tiny": "Embedded model",
}  # fmt: skip


def look(name: str) -> dict[str, Any]:
    """Return colour and marker of an implementation or method; CHAI's for an unknown one."""
    return LOOKS.get(name, LOOKS["chai"])


def label(name: str) -> str:
    """Return the printed name of a method, implementation or model."""
    if name.endswith(RANDOM):
        return f"{label(base_name(name))} with random weights"
    return LABELS.get(name, name)


def plural(count: int, noun: str) -> str:
    """Return e.g. ``1 layer``, ``2 layers``."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def clusters(counts: Sequence[int], most: int = 6) -> str:
    """Describe clusters per layer: ``k = 4 in all 32 layers``, or ``k = 32x18, 4x14 (clusters x layers)``.

    If there are more than ``most`` runs of equal counts, only the range and the mean are given.
    """
    runs = [(k, len(list(same))) for k, same in groupby(counts)]
    if len(runs) == 1:
        return f"k = {counts[0]} in all {len(counts)} layers"
    if len(runs) > most:
        return f"k = {min(counts)} to {max(counts)}, {sum(counts) / len(counts):.1f} on average"
    return "k = " + ", ".join(f"{k}{TIMES}{layers}" for k, layers in runs) + f" (clusters {TIMES} layers)"


def describe(run: Run) -> str:
    """Describe the model, its layers and heads, and the method's clusters in one line."""
    counts = run.result["heads_kept"]
    model = f"{label(run.model)}: {len(counts)} layers of {run.result['heads']} heads; "
    words = clusters(counts)
    return model + (words if len(model + words) <= LINE else clusters(counts, most=1))
