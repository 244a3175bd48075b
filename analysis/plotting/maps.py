"""Maps of attention, heads x tokens (Figures 2a, 4, 15 and 16), with common colours."""

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

from analysis.plotting import page, tokens
from analysis.results.profiles import Profile, best_profile
from analysis.results.runs import Results

SIZE, SMALLEST = 5.5, 4.6  # points, of the labels of heads and tokens
LINE = 1.18 / 72  # inches from one such label to the next, for each point of its size
COLOURS = "magma"
PAGE = 10.5  # inches, the tallest figure
NOTES = (
    "Attention of one decoding step of one sample: of the last token to itself and all before it, each row sums to 1; "
    f"logarithmic colours. {page.COUNTED}"
)


def scale(profiles: Sequence[Profile]) -> LogNorm:
    """Return colours from at most a tenth of uniform attention, a power of ten, to all attention on one token."""
    longest = max(len(profile.tokens) for profile in profiles)
    return LogNorm(10.0 ** math.floor(math.log10(0.1 / longest)), 1.0)


def show(axes: Axes, attention: NDArray[Any], norm: LogNorm) -> None:
    """Draw one map; attention below the scale has its darkest colour."""
    colours = colormaps[COLOURS].with_extremes(bad=colormaps[COLOURS](0.0))
    axes.imshow(np.ma.masked_less_equal(attention, 0), norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    page.no_grid(axes)


def bar(figure: Figure, norm: LogNorm, **where: Any) -> Colorbar:
    """Add the colour bar of maps."""
    mappable = ScalarMappable(norm, COLOURS)
    return page.color_bar(figure, mappable, "attention (share of a head's)", extend="min", **where)


def thin(count: int, inches: float) -> tuple[list[int], float]:
    """Return the labels to print so that none touch (each, or every second, third ...), and their size in points."""
    step = max(1, math.ceil(count * SMALLEST * LINE / inches))
    return list(range(0, count, step)), min(SIZE, inches * step / count / LINE)


def label_tokens(axes: Axes, texts: Sequence[str], inches: float) -> None:
    """Label tokens, upright, below a map of a certain width."""
    places, size = thin(len(texts), inches)
    names = tokens.labels(texts)
    axes.set_xticks(places, [names[i] for i in places], rotation=90, fontsize=size, parse_math=False)
    axes.set_xlabel(_axis_label("token", len(texts), places))


def label_heads(axes: Axes, heads: Sequence[int] | NDArray[Any], inches: float, along: str = "y") -> None:
    """Label heads with their numbers along an axis, whose length is in inches."""
    places, size = thin(len(heads), inches)
    getattr(axes, f"set_{along}ticks")(places, [str(int(heads[i])) for i in places], fontsize=size)
    if along == "x":
        axes.tick_params(axis="x", rotation=90)
    getattr(axes, f"set_{along}label")(_axis_label("head", len(heads), places))


def _axis_label(name: str, count: int, places: Sequence[int]) -> str:
    return f"{name} (one in {places[1]} labelled)" if 1 < len(places) < count else name


def plot_data(profile: Profile, layers: Sequence[int]) -> pd.DataFrame:
    """Return a row for each cell of some layers' maps: layer, head, position, token, attention, model, run."""
    attention = np.stack([profile.map(layer) for layer in layers])
    layer, head, position = (place.ravel() for place in np.indices(attention.shape))
    names = np.array(tokens.labels(profile.tokens), dtype=object)
    return page.rows(
        profile,
        layer=np.asarray(layers)[layer], head=head, position=position, token=names[position],
        attention=attention.ravel(),
    )  # fmt: skip


def draw_layers(results: Results, title: str, model: str) -> tuple[Figure, pd.DataFrame]:
    """Draw every layer's map in a grid on one page; ``model`` is that of the paper's figure, and preferred."""
    profile = best_profile(results, tuple(dict.fromkeys([model, page.LLAMA])))
    texts, layers = profile.tokens, profile.layers

    # Divide the page. Tokens are labelled below the lowest maps if they fit, else listed in the footer.
    columns = 2 if layers <= 4 else 4 if layers <= 40 else 8
    lines = math.ceil(layers / columns)
    left, right, top, title_height = 0.5, 0.85, 0.5, 0.16  # inches
    width = (page.WIDTH - left - right) / columns
    fits = len(thin(len(texts), width)[0]) == len(texts)
    notes = page.wrap(f"{NOTES} {page.other_model([profile], [model])}".strip())
    if not fits:
        notes += page.wrap(f"Tokens 0 to {len(texts) - 1}: {' '.join(tokens.labels(texts))}")
    longest = max(map(len, tokens.labels(texts))) if fits else 1  # letters of a label
    below = 0.37 + 0.6 * SIZE * longest / 72 + 0.06 + 0.12 * (len(notes) + 1)
    cell = min(2.4, (PAGE - top - below) / lines)  # height of a map with its title
    figure = page.of_run(profile.run, title, top + cell * lines + below, layout=None)

    norm = scale([profile])
    map_width, map_height = width - 0.07, cell - title_height
    for layer in range(layers):
        line, column = divmod(layer, columns)
        axes = page.place(figure, left + column * width, top + line * cell + title_height, map_width, map_height)
        show(axes, profile.map(layer), norm)
        axes.set_title(f"layer {layer}", fontsize=6.5, pad=2)
        # Only the maps at the left and at the bottom have labels.
        lowest = layer + columns >= layers
        if fits and lowest:
            label_tokens(axes, texts, map_width)
        else:
            axes.set_xticks(_round_ticks(len(texts), map_width))
            axes.tick_params(labelbottom=lowest, labelsize=SIZE)
            axes.set_xlabel("token" if lowest else "")
        axes.set_yticks(_round_ticks(profile.heads, map_height))
        axes.tick_params(axis="y", labelleft=column == 0, labelsize=SIZE)
        axes.set_ylabel("head" if column == 0 else "")

    tall = min(cell * lines - title_height, 4.0)
    bar(figure, norm, cax=page.place(figure, page.WIDTH - right + 0.08, top + title_height, 0.11, tall))
    page.footer(figure, [*notes, page.profile_provenance(profile)])
    return figure, plot_data(profile, range(layers))


def _round_ticks(count: int, inches: float) -> list[int]:
    """Return multiples of a round number below a count, far enough apart on an axis, whose length is in inches."""
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024, count)
    step = next(step for step in steps if step * inches / count >= 0.2)
    return list(range(0, count, step))
