"""Maps of attention, heads x tokens, as Figures 2a, 4, 15 and 16 show them, on a scale that all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis import profiles
from analysis.figures import _look, _profile, _tokens
from analysis.profiles import Profile
from analysis.saved import Results

SIZE, SMALLEST = 5.5, 4.6  # points, of the labels of heads and tokens
LINE = 1.18 / 72  # inches from one such label to the next, for each point of its size
SAMPLE = 0  # the kept sample that is drawn
COLOURS = "magma"
PAGE = 10.5  # inches, the tallest figure
NOTES = (
    "Attention of one decoding step of one sample: of the last token to itself and all before it, each row sums to 1; "
    f"logarithmic colours. {_profile.COUNTED}"
)


def scale(drawn: Sequence[Profile]) -> LogNorm:
    """From a tenth of uniform attention over the longest map or less, a power of ten, to all attention on one token."""
    longest = max(len(profile.tokens(SAMPLE)) for profile in drawn)
    return LogNorm(10.0 ** math.floor(math.log10(0.1 / longest)), 1.0)


def show(axes: Axes, attention: NDArray[Any], norm: LogNorm) -> None:
    """One map; attention below the scale has its darkest colour."""
    colours = colormaps[COLOURS].with_extremes(bad=colormaps[COLOURS](0.0))
    axes.imshow(np.ma.masked_less_equal(attention, 0), norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    _profile.no_grid(axes)


def bar(figure: Figure, norm: LogNorm, **where: Any) -> Colorbar:
    """The colour bar of maps; where it goes, as for :meth:`matplotlib.figure.Figure.colorbar`."""
    drawn = figure.colorbar(ScalarMappable(norm, COLOURS), extend="min", **where)
    drawn.set_label("attention (share of a head's)")
    drawn.ax.grid(False)
    drawn.outline.set_linewidth(0.5)
    return drawn


def thin(count: int, inches: float) -> tuple[list[int], float]:
    """Which of so many labels to print for them not to touch: each, or every second, third ...; and their size."""
    step = max(1, math.ceil(count * SMALLEST * LINE / inches))
    return list(range(0, count, step)), min(SIZE, inches * step / count / LINE)


def label_tokens(axes: Axes, tokens: Sequence[str], inches: float) -> None:
    """Tokens upright under a map of a certain width."""
    shown, size = thin(len(tokens), inches)
    names = _tokens.labels(tokens)
    axes.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=size, parse_math=False)
    axes.set_xlabel(_axis("token", len(tokens), shown))


def label_heads(axes: Axes, heads: Sequence[int], inches: float, along: str = "y") -> None:
    """Numbers of heads beside a map of a certain height (or under one, of a certain width)."""
    shown, size = thin(len(heads), inches)
    getattr(axes, f"set_{along}ticks")(shown, [str(heads[i]) for i in shown], fontsize=size)
    if along == "x":
        axes.tick_params(axis="x", rotation=90)
    getattr(axes, f"set_{along}label")(_axis("head", len(heads), shown))


def _axis(name: str, count: int, shown: Sequence[int]) -> str:
    return name if len(shown) == count else f"{name} (one in {shown[1]} labelled)" if len(shown) > 1 else name


def plotted(profile: Profile, layers: Sequence[int]) -> pd.DataFrame:
    """One row for each cell of the maps of some layers: layer, head, position, token, attention, model, run."""
    maps = np.stack([profile.map(layer, SAMPLE) for layer in layers])
    layer, head, position = (place.ravel() for place in np.indices(maps.shape))
    tokens = np.array(_tokens.labels(profile.tokens(SAMPLE)), dtype=object)
    return _profile.rows(
        profile,
        layer=np.asarray(layers)[layer], head=head, position=position, token=tokens[position], attention=maps.ravel(),
    )  # fmt: skip


def draw_layers(results: Results, title: str, model: str) -> tuple[Figure, pd.DataFrame]:
    """Every layer's map in a grid on one page, small, and its data.

    Args:
        results: where the profile is looked for.
        title: the heading, with the paper's number.
        model: the one that the paper shows.

    Raises:
        MissingRun: there is no profile.
    """
    profile = profiles.best(results, tuple(dict.fromkeys([model, _profile.LLAMA])))
    tokens, heads = profile.tokens(SAMPLE), profile.heads
    columns = 2 if profile.layers <= 4 else 4 if profile.layers <= 40 else 8
    lines = math.ceil(profile.layers / columns)
    left, right, top, title_height = 0.5, 0.85, 0.5, 0.16  # inches
    width = (_look.WIDTH - left - right) / columns
    fits = len(thin(len(tokens), width)[0]) == len(tokens)
    notes = _profile.wrap(f"{NOTES} {_profile.other_model([profile], [model])}".strip())
    if not fits:
        notes += _profile.wrap(f"Tokens 0 to {len(tokens) - 1}: {_tokens.sentence(tokens)}")
    longest = max(map(len, _tokens.labels(tokens))) if fits else 1  # letters under the lowest maps
    below = 0.37 + 0.6 * SIZE * longest / 72 + 0.06 + 0.12 * (len(notes) + 1)
    cell = min(2.4, (PAGE - top - below) / lines)  # with its title
    height = top + cell * lines + below
    figure = _profile.page(title, profile, height, layout=None)
    norm = scale([profile])
    for layer in range(profile.layers):
        line, column = divmod(layer, columns)
        inner = (width - 0.07, cell - title_height)
        axes = _profile.place(figure, left + column * width, top + line * cell + title_height, *inner)
        show(axes, profile.map(layer, SAMPLE), norm)
        axes.set_title(f"layer {layer}", fontsize=6.5, pad=2)
        last = layer + columns >= profile.layers
        if fits and last:
            label_tokens(axes, tokens, inner[0])
        else:
            axes.set_xticks(_round(len(tokens), inner[0]))
            axes.tick_params(labelbottom=last, labelsize=SIZE)
            axes.set_xlabel("token" if last else "")
        axes.set_yticks(_round(heads, inner[1]))
        axes.tick_params(axis="y", labelleft=column == 0, labelsize=SIZE)
        axes.set_ylabel("head" if column == 0 else "")
    tall = min(cell * lines - title_height, 4.0)
    beside = _profile.place(figure, _look.WIDTH - right + 0.08, top + title_height, 0.11, tall)
    bar(figure, norm, cax=beside)
    _look.footer(figure, [*notes, _profile.provenance(profile)])
    return figure, plotted(profile, range(profile.layers))


def _round(count: int, inches: float) -> list[int]:
    """Multiples of a round number below a count, far enough apart on an axis of so many inches."""
    step = next(
        step
        for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024, count)
        if step * inches / count >= 0.2
    )
    return list(range(0, count, step))
