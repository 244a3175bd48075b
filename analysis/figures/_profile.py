"""What figures of a profile share: the command, heading and footer, panels of a given size, colours of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from analysis import profiles
from analysis.figures import _look
from analysis.profiles import Profile
from analysis.saved import base_name

EXPERIMENT = profiles.EXPERIMENT
COMMAND = "python run.py experiment=profile model=llama7b corpus=c4"
COMMAND_OPT = "python run.py experiment=profile model=opt66b corpus=c4"
LLAMA, OPT = "llama7b", "opt66b"
COUNTED = "Layers and heads are counted from 0."
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def page(title: str, profile: Profile, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure with its heading; :func:`sign` comes last.

    Args:
        title: with the paper's number.
        profile: what is drawn.
        height: inches.
        layout: ``None``: the panels are placed by :func:`place`.
    """
    return headed(f"{title}\n{_look.describe(profile.run)}", height, layout)


def headed(heading: str, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure under a heading."""
    figure = Figure(figsize=(_look.WIDTH, height), layout=layout)  # type: ignore[arg-type]
    # The constrained layout makes room for the heading unless it is told where that is.
    where: dict[str, Any] = {} if layout else {"y": 1 - 0.08 / height, "va": "top"}
    figure.suptitle(heading, x=0.02, ha="left", linespacing=1.4, **where)
    return figure


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """A panel placed in inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def sign(figure: Figure, drawn: Sequence[Profile], notes: str, paper: Sequence[str] = (LLAMA,)) -> None:
    """The footer: how to read the figure, then where each profile is from.

    Args:
        figure: with everything drawn.
        drawn: the profiles.
        notes: how to read it.
        paper: the models of the paper's figure, named if they weren't drawn.
    """
    _look.footer(figure, [*wrap(f"{notes} {other_model(drawn, paper)}".strip()), *map(provenance, drawn)])


def other_model(drawn: Sequence[Profile], paper: Sequence[str]) -> str:
    """A sentence where the paper's figure is of models that weren't drawn, else nothing."""
    models = {base_name(profile.run.model) for profile in drawn}
    return "" if models >= set(paper) else f"The paper's figure is of {' and '.join(map(_look.label, paper))}."


def wrap(text: str) -> list[str]:
    """Lines that fit the page in small print."""
    font = get_font(findfont(FontProperties()))
    font.set_size(_look.SMALL, 720)  # large: small letters are rounded to whole dots
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        font.set_text(longer)
        if font.get_width_height()[0] / 64 / 720 > 0.965 * _look.WIDTH:  # from 64ths of a dot
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def provenance(profile: Profile) -> str:
    """Device, dtype, corpus and run."""
    corpus = profile.about["corpus"]
    samples = f"{corpus['samples']:,} sample{'s' if corpus['samples'] != 1 else ''}"
    return _look.provenance(profile.run, f"{corpus['name']}, {samples} of up to {corpus['longest']:,} tokens")


def rows(profile: Profile, **columns: Any) -> pd.DataFrame:
    """Plotted data with the model and run they are of; scalars count for every row."""
    frame = pd.DataFrame(columns)
    return frame.assign(model=profile.run.model, run=profile.run.result["run_id"])


def no_grid(axes: Axes) -> None:
    """For pictures: no lines across, a frame all around, ticks outside."""
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_linewidth(0.5)
    axes.tick_params(length=1.5, width=0.4, pad=1.5)


def whole_numbers() -> MaxNLocator:
    """Ticks of an axis of layers or tokens."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)


def count_ticks(axes: Axes, most: int) -> None:
    """Ticks for counts from 1 up: all of a few, else 1 and multiples of a quarter of the most."""
    step = max(1, most // 4) if most > 8 else 1
    axes.set_xticks([1, *range(step if step > 1 else 2, most + 1, step)])


def depth(layers: int) -> tuple[Colormap, ScalarMappable]:
    """Colours by layer and what a colour bar is made from: dark to light, without the lightest, unreadable on white."""
    shades = ListedColormap(colormaps["viridis"].resampled(256)([i / 255 * 0.9 for i in range(256)]))
    return shades, ScalarMappable(Normalize(0, max(layers - 1, 1)), shades)


def depth_bar(figure: Figure, axes: Sequence[Axes], layers: int) -> None:
    """The colour bar of :func:`depth` beside panels: it stands for a legend of all layers."""
    bar = figure.colorbar(depth(layers)[1], ax=list(axes), fraction=0.03, pad=0.015, aspect=28)
    bar.set_label("layer")
    bar.ax.grid(False)
    step = max(1, -(-layers // 8))
    ticks = list(range(0, layers, step))
    bar.set_ticks(ticks if layers - 1 - ticks[-1] < step / 2 else [*ticks, layers - 1])
    bar.outline.set_linewidth(0.5)
