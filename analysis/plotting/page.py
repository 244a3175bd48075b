"""The page of a figure: heading, panels, legends, colour bars, axes, and the footer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from analysis.plotting.style import GREY, TIMES, describe, label, plural
from analysis.results.profiles import Profile
from analysis.results.runs import Run, base_name

WIDTH = 7.4  # inches
SMALL = 6.5  # points, of the footer
LLAMA, OPT = "llama7b", "opt66b"  # the models of the paper's figures
COUNTED = "Layers and heads are counted from 0."


def new(heading: str, height: float, layout: str | None = "constrained") -> Figure:
    """Return an empty figure under a heading; without a layout, its panels are placed with :func:`place`."""
    figure = Figure(figsize=(WIDTH, height), layout=layout)  # type: ignore[arg-type]
    # The constrained layout makes room for the heading unless its place is given.
    where: dict[str, Any] = {} if layout else {"y": 1 - 0.08 / height, "va": "top"}
    figure.suptitle(heading, x=0.02, ha="left", linespacing=1.4, **where)
    return figure


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add a panel at a place in inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def of_run(run: Run, title: str, height: float = 4.0, layout: str | None = "constrained") -> Figure:
    """Return an empty figure of a run, described in the heading; for arguments see :func:`new`."""
    return new(f"{title}\n{describe(run)}", height, layout)


def finish(figure: Figure, run: Run, notes: str) -> None:
    """Add legends below the panels, and the footer with notes."""
    # Longer legends make the figure taller, so that the panels keep their size.
    rows = max(len(axes.get_legend_handles_labels()[0]) for axes in figure.axes)
    figure.set_size_inches(WIDTH, 3.2 + 0.15 * rows)
    for axes in figure.axes:
        legend_below(axes)
    footer(figure, [*wrap(notes), provenance(run, f"batch {run.result['batch_size']}")])


def finish_profiles(figure: Figure, profiles: Sequence[Profile], notes: str, paper: Sequence[str] = (LLAMA,)) -> None:
    """Add the footer: notes, the models of the paper's figure if others are drawn, the source of each profile."""
    words = wrap(f"{notes} {other_model(profiles, paper)}".strip())
    footer(figure, [*words, *map(profile_provenance, profiles)])


def requested(clusters: int | None) -> str:
    """Return a sentence that says that a number of clusters was requested; empty if the profile's are shown."""
    return "" if clusters is None else f"With {plural(clusters, 'cluster')} in every layer, as requested."


def other_model(profiles: Sequence[Profile], paper: Sequence[str]) -> str:
    """Return a sentence that names the models of the paper's figure; empty if they were drawn."""
    models = {base_name(profile.run.model) for profile in profiles}
    return "" if models >= set(paper) else f"The paper's figure is of {' and '.join(map(label, paper))}."


def profile_provenance(profile: Profile) -> str:
    """Return device, dtype, corpus and run."""
    corpus, samples = profile.about["corpus"], plural(profile.samples, "sample")
    return provenance(profile.run, f"{corpus['name']}, {samples} of up to {corpus['longest']:,} tokens")


def rows(profile: Profile, **columns: Any) -> pd.DataFrame:
    """Return plotted data with model and run; scalars are repeated in every row."""
    frame = pd.DataFrame(columns)
    return frame.assign(model=profile.run.model, run=profile.run.result["run_id"])


def legend_below(axes: Axes) -> None:
    """Add a panel's legend below its axis, where it covers no data."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0, -0.44, figure.dpi_scale_trans)  # inches: ticks and axis label
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, borderaxespad=0)


def provenance(run: Run, *words: str) -> str:
    """Return device, dtype, further words, version of torch, and run id."""
    torch = run.versions.get("torch")
    parts = [run.device, run.dtype, *words, *([f"torch {torch}"] if torch else [])]
    return " · ".join([*parts, f"run {run.result['run_id']}"])


def footer(figure: Figure, lines: Sequence[str]) -> None:
    """Add small print at the bottom of a figure whose size is final; a constrained layout keeps clear of it."""
    height = figure.get_size_inches()[1]
    space = 0.06 + 0.12 * len(lines)  # inches
    style: dict[str, Any] = {"fontsize": SMALL, "color": GREY, "linespacing": 1.35, "parse_math": False}
    figure.text(0.02, 0.04 / height, "\n".join(lines), **style)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, space / height, 1, 1 - space / height), w_pad=0.08, wspace=0.04)


def wrap(text: str) -> list[str]:
    """Break text into lines that fit the page in small print."""
    font = get_font(findfont(FontProperties()))
    font.set_size(SMALL, 720)  # at a high resolution: at a low one widths are rounded to whole dots
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        font.set_text(longer)
        if font.get_width_height()[0] / 64 / 720 > 0.965 * WIDTH:  # the font's unit is 1/64 dot
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def color_bar(figure: FigureBase, mappable: ScalarMappable, name: str, **where: Any) -> Colorbar:
    """Add a colour bar; ``where`` as for :meth:`matplotlib.figure.Figure.colorbar`."""
    bar = figure.colorbar(mappable, **where)
    bar.set_label(name)
    bar.ax.grid(False)
    bar.outline.set_linewidth(0.5)
    return bar


def no_grid(axes: Axes) -> None:
    """Prepare a panel for a picture: no grid, a frame all around, small ticks."""
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_linewidth(0.5)
    axes.tick_params(length=1.5, width=0.4, pad=1.5)


def whole_numbers() -> MaxNLocator:
    """Return ticks for an axis of layers or tokens."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)


def count_ticks(axes: Axes, most: int) -> None:
    """Set ticks for counts from 1 up: all of a few, else 1 and multiples of a quarter of the most."""
    step = max(1, most // 4) if most > 8 else 1
    axes.set_xticks([1, *range(step if step > 1 else 2, most + 1, step)])


def depth(layers: int) -> ScalarMappable:
    """Return colours by layer, dark to light without the lightest (unreadable on white), for lines and a colour bar."""
    shades = ListedColormap(colormaps["viridis"].resampled(256)([i / 255 * 0.9 for i in range(256)]))
    return ScalarMappable(Normalize(0, max(layers - 1, 1)), shades)


def depth_bar(figure: Figure, axes: Sequence[Axes], layers: int) -> None:
    """Add the colour bar of :func:`depth` beside panels, in place of a legend of all layers."""
    bar = color_bar(figure, depth(layers), "layer", ax=list(axes), fraction=0.03, pad=0.015, aspect=28)
    step = max(1, -(-layers // 8))
    ticks = list(range(0, layers, step))
    bar.set_ticks(ticks if layers - 1 - ticks[-1] < step / 2 else [*ticks, layers - 1])


def length_axis(axes: Axes, lengths: Iterable[int], room: float = 0.09) -> float:
    """Make the x axis one of sequence length, log2, with the lengths as ticks; return the ratio of last to first.

    The room to the right of the last tick is a share of the distance from the first to the last.
    """
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    span = ticks[-1] / ticks[0] if len(ticks) > 1 else 2.0
    axes.set(xlim=(ticks[0] / span**0.06, ticks[-1] * span**room), xlabel="sequence length (tokens)")
    return span


def ratio_axis(axes: Axes, values: Iterable[float]) -> None:
    """Make the y axis one of ratios, log, with a line at 1."""
    low, high = min(*values, 1.0) / 1.15, max(*values, 1.0) * 1.15
    # Choose ticks in every power of ten: fewer for a wider range.
    if high / low > 12:
        steps: tuple[float, ...] = (1, 2, 5)
    elif high / low > 2.6:
        steps = (1, 1.5, 2, 3, 5, 7)
    else:
        steps = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.4, 5, 6, 7, 8, 9)
    axes.set(yscale="log", ylim=(low, high))
    axes.yaxis.set_major_locator(FixedLocator(sorted({step * 10.0**power for step in steps for power in range(-3, 4)})))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
    axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
