"""What all figures have in common: colours, names, axes, legends below the panels, and the footer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from analysis.saved import Run
from analysis.tables._settings import METHODS

STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "legend.fontsize": 7.5, "figure.titlesize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6,
    "lines.linewidth": 1.4, "lines.markersize": 5, "legend.frameon": False, "legend.handlelength": 2.6,
    "legend.labelspacing": 0.35,
    "pdf.fonttype": 42,  # text stays text in the PDF
}  # fmt: skip

WIDTH = 7.4  # inches
LINE = 102  # characters of a heading that fit into that
SMALL = 6.5  # points, of the footer
INK, GREY = "#222222", "#777777"
TIMES = "\N{MULTIPLICATION SIGN}"
#: Okabe-Ito: told apart with colour-blind eyes. The markers tell them apart without colour.
LOOKS: dict[str, dict[str, Any]] = {
    "mha": {"color": "#0072B2", "marker": "o"},
    "sdpa": {"color": "#0072B2", "marker": "o"},
    "eager": {"color": "#E69F00", "marker": "s"},
    "xformers": {"color": "#CC79A7", "marker": "v"},
    "chai": {"color": "#D55E00", "marker": "D", "markersize": 4.5},
    "chai_static": {"color": "#D55E00", "marker": "D", "markersize": 4.5, "markerfacecolor": "white"},
    "chai_qkv": {"color": "#D55E00", "marker": "X", "markersize": 6},
    "static": {"color": "#CC79A7", "marker": "v"},
    "random": {"color": "#777777", "marker": "s", "markersize": 4.5},
    "dejavu": {"color": "#009E73", "marker": "^"},
    "spatten": {"color": "#56B4E9", "marker": "p", "markersize": 6},
}
#: For what is shown beside the main series.
EXTRA: tuple[dict[str, Any], ...] = (
    {"color": "#009E73", "marker": "^"},
    {"color": "#56B4E9", "marker": "<"},
    {"color": "#CC79A7", "marker": ">"},
)
PAPER: dict[str, Any] = {"color": INK, "linestyle": ":", "marker": ".", "markersize": 3}
LABELS = {
    **METHODS, "sdpa": "SDPA", "xformers": "xFormers",
    "llama7b": "LLaMA-7B", "llama2_7b": "Llama-2-7B", "llama3_8b": "Llama-3-8B", "llama33b": "LLaMA-33B",
    "opt66b": "OPT-66B", "tiny": "Embedded model",
}  # fmt: skip


def look(name: str) -> dict[str, Any]:
    """Colour and marker of an implementation or method; one that isn't known gets CHAI's place."""
    return LOOKS.get(name, LOOKS["chai"])


def label(name: str) -> str:
    """What a method, implementation or model is called in print."""
    if name.endswith("-random"):
        return f"{label(name.removesuffix('-random'))} with random weights"
    return LABELS.get(name, name)


def clusters(counts: Sequence[int], most: int = 6) -> str:
    """Clusters per layer, as ``k = 4 in all 32 layers`` or in runs, as ``k = 32x18, 4x14 (clusters x layers)``.

    Args:
        counts: of each layer.
        most: runs; if there are more, only the range and the mean are given.
    """
    runs = [(k, len(list(same))) for k, same in groupby(counts)]
    if len(runs) == 1:
        return f"k = {counts[0]} in all {len(counts)} layers"
    if len(runs) > most:
        return f"k = {min(counts)} to {max(counts)}, {sum(counts) / len(counts):.1f} on average"
    return "k = " + ", ".join(f"{k}{TIMES}{layers}" for k, layers in runs) + f" (clusters {TIMES} layers)"


def describe(run: Run) -> str:
    """The model, its layers and heads, and the method's clusters."""
    counts = run.result["heads_kept"]
    model = f"{label(run.model)}: {len(counts)} layers of {run.result['heads']} heads; "
    words = clusters(counts)
    return model + (words if len(model + words) <= LINE else clusters(counts, most=1))


def panels(run: Run, title: str, widths: tuple[float, float] = (1, 1)) -> tuple[Figure, list[Axes]]:
    """An empty figure with two panels side by side and its heading; :func:`finish` comes last."""
    figure = Figure(layout="constrained")
    axes = list(figure.subplots(1, 2, width_ratios=widths))
    figure.suptitle(f"{title}\n{describe(run)}", x=0.02, ha="left", linespacing=1.4)
    return figure, axes


def finish(figure: Figure, run: Run, notes: str) -> None:
    """Legends under the panels, where they cover no data, and a footer that says where the numbers are from.

    Args:
        figure: with everything drawn.
        run: what was drawn.
        notes: how to read it, one line.
    """
    handles = [axes.get_legend_handles_labels()[0] for axes in figure.axes]
    rows = max(map(len, handles))
    height = 3.2 + 0.15 * rows  # inches: longer legends take nothing from the panels
    figure.set_size_inches(WIDTH, height)
    for axes in figure.axes:
        legend_below(axes)
    footer(figure, [notes, provenance(run, f"batch {run.result['batch_size']}")])


def legend_below(axes: Axes) -> None:
    """A panel's legend, under its axis where it covers no data."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0, -0.44, figure.dpi_scale_trans)  # inches: ticks and axis label
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, borderaxespad=0)


def provenance(run: Run, *what: str) -> str:
    """Where the numbers are from: device, dtype, what was measured, version of torch, run id."""
    torch = run.result["versions"].get("torch")
    made = [run.device, str(run.result["dtype"]), *what, *([f"torch {torch}"] if torch else [])]
    return " · ".join([*made, f"run {run.result['run_id']}"])


def footer(figure: Figure, lines: Sequence[str]) -> None:
    """Small print at the bottom of a figure whose size is final; panels that are laid out by constraints keep clear."""
    height = figure.get_size_inches()[1]
    space = 0.06 + 0.12 * len(lines)  # inches
    style: dict[str, Any] = {"fontsize": SMALL, "color": GREY, "linespacing": 1.35, "parse_math": False}
    figure.text(0.02, 0.04 / height, "\n".join(lines), **style)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, space / height, 1, 1 - space / height), w_pad=0.08, wspace=0.04)


def length_axis(axes: Axes, lengths: Iterable[int], room: float = 0.09) -> None:
    """Sequence length on a log2 axis, with the lengths as ticks.

    Args:
        axes: the panel.
        lengths: tokens.
        room: free space to the right of the last, as a share of the distance from the first to the last.
    """
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    span = ticks[-1] / ticks[0] if len(ticks) > 1 else 2.0
    axes.set_xlim(ticks[0] / span**0.06, ticks[-1] * span**room)
    axes.set_xlabel("sequence length (tokens)")


def ratio_axis(axes: Axes, values: Iterable[float]) -> None:
    """Ratios on a log axis, where twice as fast and half as fast are equally far from the line at 1."""
    low, high = min(*values, 1.0) / 1.15, max(*values, 1.0) * 1.15
    if high / low > 12:
        steps: tuple[float, ...] = (1, 2, 5)
    elif high / low > 2.6:
        steps = (1, 1.5, 2, 3, 5, 7)
    else:
        steps = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.4, 5, 6, 7, 8, 9)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(sorted({step * 10.0**power for step in steps for power in range(-3, 4)})))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
