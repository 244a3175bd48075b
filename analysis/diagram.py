"""The diagram of docs/method.md, from five tokens to the cache: ``python -m analysis.diagram`` writes docs/method.svg.

On an opaque light ground, with its letters as outlines: it looks the same on light and dark pages and with any fonts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from analysis.overview import GROUPS, REPRESENTATIVES

TARGET = Path(__file__).resolve().parent.parent / "docs" / "method.svg"
INK, GREY, PALE = "#222222", "#5f5f5f", "#9a9a9a"
COLOURS = ("#0072B2", "#C25400", "#007A5A")  # dark enough for white letters, told apart with colour-blind eyes
HEADS, TOKENS = len(GROUPS), 5
#: What a head of each group attends to at a row of the causal matrix: the first token, itself, the one before.
PATTERNS = (lambda row: 0, lambda row: row, lambda row: max(0, row - 1))


def panel(axes: Axes, number: int, title: str, subtitle: str) -> None:
    """An empty panel, with its heading."""
    axes.set_xlim(0, 10)
    axes.set_ylim(1, 11)
    axes.axis("off")
    axes.text(0.1, 10.2, f"{number}  {title}", fontsize=11, fontweight="bold", color=INK)
    axes.text(0.1, 9.45, subtitle, fontsize=8, color=GREY)


def square(axes: Axes, x: float, y: float, size: tuple[float, float], colour: str, text: str = "") -> None:
    """A filled box with a letter in it."""
    axes.add_patch(Rectangle((x, y), *size, facecolor=colour, edgecolor="none"))
    axes.text(x + size[0] / 2, y + size[1] / 2 - 0.03, text, ha="center", va="center", color="white", fontsize=8)


def hollow(axes: Axes, x: float, y: float, size: tuple[float, float], text: str = "") -> None:
    """What isn't computed, or isn't stored."""
    axes.add_patch(Rectangle((x, y), *size, facecolor="none", edgecolor=PALE, linestyle=(0, (2, 1.5)), linewidth=0.9))
    axes.text(x + size[0] / 2, y + size[1] / 2 - 0.03, text, ha="center", va="center", color=PALE, fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    """From one thing to the next."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1))


def attention(axes: Axes, x: float, y: float, group: int, cell: float = 0.24) -> None:
    """A head's causal matrix of the first tokens, its lower left corner at ``x, y``."""
    for row in range(TOKENS):
        for column in range(row + 1):
            strong = column == PATTERNS[group](row)
            place = (x + cell * column, y + cell * (TOKENS - 1 - row))
            axes.add_patch(
                Rectangle(place, cell * 0.86, cell * 0.86, facecolor=COLOURS[group], alpha=1.0 if strong else 0.2)
            )


def columns() -> list[float]:
    """Where the heads stand in a panel."""
    return [0.2 + 1.62 * head for head in range(HEADS)]


def draw_tokens(axes: Axes) -> None:
    """The first five tokens go through all heads."""
    panel(axes, 1, "Five tokens, all heads", "multi-head attention, once a request")
    for token in range(TOKENS + 3):
        x = 0.2 + 1.2 * token
        if token < TOKENS:
            square(axes, x, 7.3, (1.0, 0.9), INK, f"$t_{token + 1}$")
        else:
            hollow(axes, x, 7.3, (1.0, 0.9), f"$t_{token + 1}$")
    axes.text(6.3, 6.7, "later tokens wait", fontsize=7.5, color=GREY)
    for head, x in enumerate(columns()):
        axes.text(x + 0.6, 5.35, f"head {head + 1}", ha="center", fontsize=7.5, color=COLOURS[GROUPS[head]])
        attention(axes, x, 3.9, GROUPS[head])
    arrow(axes, (3.1, 7.1), (3.1, 5.9))
    axes.text(
        0.1, 2.7, r"$x_h=\mathrm{softmax}(Q_hK_h^{\top}/\sqrt{D})$, 5 by 5, for every head $h$", fontsize=9, color=INK
    )
    axes.text(0.1, 1.6, "causal: each token sees itself and those before it", fontsize=7.5, color=GREY)


def draw_clusters(axes: Axes) -> None:
    """K-means, and a representative of each cluster."""
    panel(axes, 2, "K-means, layer by layer", "k is known from the offline phase: here 3 of 6")
    for group, y in enumerate((7.4, 5.6, 3.8)):
        members = [head for head in range(HEADS) if GROUPS[head] == group]
        axes.text(0.1, y + 0.28, f"cluster {group + 1}", fontsize=8, color=COLOURS[group], fontweight="bold")
        for place, head in enumerate(members):
            x = 2.6 + 2.2 * place
            attention(axes, x, y, group)
            if head in REPRESENTATIVES:
                frame = Rectangle(
                    (x - 0.16, y - 0.16), 1.5, 1.5, facecolor="none", edgecolor=COLOURS[group], linewidth=1.6
                )
                axes.add_patch(frame)
            axes.text(x + 0.98, y + 0.86, str(head + 1), fontsize=8, color=INK, ha="center")
    axes.text(0.1, 2.7, "framed: the representative $r(c)$, nearest the mean", fontsize=8.5, color=INK)
    axes.text(0.1, 1.6, "decided once, then fixed for the request", fontsize=7.5, color=GREY)


def draw_scores(axes: Axes) -> None:
    """From the sixth token on, only representatives have queries, keys and scores."""
    panel(axes, 3, "From the sixth token on", "queries, keys and scores of representatives alone")
    for head, x in enumerate(columns()):
        kept, colour = head in REPRESENTATIVES, COLOURS[GROUPS[head]]
        for name, y in (("Q", 7.6), ("K", 6.4)):
            label = f"${name}_{head + 1}$"
            square(axes, x, y, (1.2, 0.9), colour, label) if kept else hollow(axes, x, y, (1.2, 0.9), label)
        if kept:
            arrow(axes, (x + 0.6, 6.3), (x + 0.6, 5.2), colour)
            square(axes, x, 4.2, (1.2, 0.9), colour, f"$A_{head + 1}$")
    axes.text(
        0.1, 2.7, r"$A_r=\mathrm{softmax}(Q_rK_r^{\top}/\sqrt{D})$ for the $k$ representatives", fontsize=9, color=INK
    )
    axes.text(0.1, 1.6, "dashed: not projected, not scored, not stored", fontsize=7.5, color=GREY)


def draw_values(axes: Axes) -> None:
    """Members take their representative's attention to their own values."""
    panel(axes, 4, "Members reuse the attention", "each head with its own values")
    places = columns()
    for head, x in enumerate(places):
        colour = COLOURS[GROUPS[head]]
        representative = REPRESENTATIVES[GROUPS[head]]
        if head == representative:
            square(axes, x, 7.6, (1.2, 0.9), colour, f"$A_{head + 1}$")
        arrow(axes, (places[representative] + 0.6, 7.5), (x + 0.6, 5.85), colour)
        square(axes, x, 4.9, (1.2, 0.9), colour, f"$V_{head + 1}$")
        arrow(axes, (x + 0.6, 4.8), (x + 0.6, 4.25), GREY)
        axes.text(x + 0.6, 3.75, f"$y_{head + 1}$", ha="center", fontsize=9, color=INK)
    axes.text(0.1, 2.7, "$y_h=A_{r(c(h))}V_h$,   $c(h)$ the cluster of head $h$", fontsize=9, color=INK)
    axes.text(0.1, 1.6, "CHAI-QKV: $V_{r(c(h))}$ in place of $V_h$", fontsize=7.5, color=GREY)


def draw_cache(axes: Axes) -> None:
    """What stays in memory."""
    panel(axes, 5, "The cache", "keys of representatives, values of all")
    cell = (0.52, 0.42)
    for block, name, top in ((0, "K", 8.3), (1, "V", 5.3)):
        axes.text(0.1, top - 1.1, name, fontsize=12, fontweight="bold", color=INK)
        for head in range(HEADS):
            y = top - 0.45 * head
            axes.text(1.35, y + 0.1, str(head + 1), fontsize=6.5, color=GREY, ha="right")
            for token in range(12):
                place = 1.6 + 0.57 * token
                if block or head in REPRESENTATIVES:
                    axes.add_patch(Rectangle((place, y), *cell, facecolor=COLOURS[GROUPS[head]], edgecolor="none"))
                else:
                    hollow(axes, place, y, cell)
    axes.text(8.6, 7.2, "$k$ of $H$", fontsize=8, color=INK)
    axes.text(8.6, 4.2, "$H$ of $H$", fontsize=8, color=INK)
    axes.text(0.1, 1.6, r"$\frac{H+k}{2H}$ of the bytes: here 9 of 12, for good", fontsize=9.5, color=INK)


def draw() -> Figure:
    """All five panels."""
    figure = plt.figure(figsize=(11, 7.0), facecolor="#fbfbfb")
    drawn = (draw_tokens, draw_clusters, draw_scores, draw_values, draw_cache)
    for axes, content in zip(_grid(figure), drawn, strict=True):
        content(axes)
    return figure


def _grid(figure: Figure) -> Sequence[Axes]:
    """Two panels above, three below."""
    width, height = 0.31, 0.455
    above = [figure.add_axes((x, 0.53, width, height)) for x in (0.14, 0.55)]
    below = [figure.add_axes((0.02 + 0.33 * place, 0.015, width, height)) for place in range(3)]
    return [*above, *below]


def main() -> None:
    """Write it, or a PNG to look at."""
    parser = argparse.ArgumentParser(prog="python -m analysis.diagram", description="Draw the diagram of the method.")
    parser.add_argument("--out", type=Path, default=TARGET, help="an .svg or .png file (docs/method.svg)")
    out = parser.parse_args().out
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "chai"}):
        draw().savefig(out, dpi=130, metadata={"Date": None} if out.suffix == ".svg" else None)
    print(out)


if __name__ == "__main__":
    main()
