"""Draw the documentation's diagrams: ``python -m analysis.diagrams method`` or ``overview``.

The diagram of the method, docs/method.svg, has an opaque light ground and outlines for letters: it looks the same on
light and dark pages, with any fonts. The overview, docs/overview.png, is the README's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

DOCS = Path(__file__).resolve().parent.parent / "docs"
GROUPS = (0, 0, 1, 0, 2, 1)  # cluster of each head
REPRESENTATIVES = (1, 2, 4)  # head of each cluster
HEADS, TOKENS = len(GROUPS), 5
MEMBERS = [[head for head, group in enumerate(GROUPS) if group == cluster] for cluster in range(3)]
#: The token that a head of each cluster attends to in a row of the causal matrix: the first, itself, the one before.
PATTERNS = (lambda row: 0, lambda row: row, lambda row: max(0, row - 1))

# The diagram of the method: five panels, from five tokens to the cache.

INK, GREY, PALE = "#222222", "#5f5f5f", "#9a9a9a"
COLOURS = ("#0072B2", "#C25400", "#007A5A")  # dark enough for white letters, distinct for colour-blind readers
PLACES = [0.2 + 1.62 * head for head in range(HEADS)]  # x of the heads in a panel
BOX = (1.2, 0.9)  # width and height of a query, key, value or attention matrix


def panel(axes: Axes, number: int, title: str, subtitle: str) -> None:
    """Prepare a panel and write its heading."""
    axes.set(xlim=(0, 10), ylim=(1, 11))
    axes.axis("off")
    axes.text(0.1, 10.2, f"{number}  {title}", fontsize=11, fontweight="bold", color=INK)
    axes.text(0.1, 9.45, subtitle, fontsize=8, color=GREY)


def captions(axes: Axes, formula: str, note: str, size: float = 9) -> None:
    """Write the two lines at the bottom of a panel."""
    axes.text(0.1, 2.7, formula, fontsize=size, color=INK)
    axes.text(0.1, 1.6, note, fontsize=7.5, color=GREY)


def square(axes: Axes, x: float, y: float, colour: str | None, text: str, size: tuple[float, float] = BOX) -> None:
    """Draw a filled box with a letter; without a colour a dashed one, of what is not computed or not stored."""
    style: dict[str, Any] = {"facecolor": colour, "edgecolor": "none"}
    if colour is None:
        style = {"facecolor": "none", "edgecolor": PALE, "linestyle": (0, (2, 1.5)), "linewidth": 0.9}
    axes.add_patch(Rectangle((x, y), *size, **style))
    center = (x + size[0] / 2, y + size[1] / 2 - 0.03)
    axes.text(*center, text, ha="center", va="center", color="white" if colour else PALE, fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    """Draw an arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1))


def attention(axes: Axes, x: float, y: float, group: int) -> None:
    """Draw the causal matrix of the first tokens of a head, with its lower left corner at ``x, y``."""
    cell = 0.24
    for row in range(TOKENS):
        for column in range(row + 1):
            place = (x + cell * column, y + cell * (TOKENS - 1 - row))
            alpha = 1.0 if column == PATTERNS[group](row) else 0.2
            axes.add_patch(Rectangle(place, cell * 0.86, cell * 0.86, facecolor=COLOURS[group], alpha=alpha))


def draw_tokens(axes: Axes) -> None:
    """Draw the first five tokens, which go through all heads."""
    panel(axes, 1, "Five tokens, all heads", "multi-head attention, once per request")
    for token in range(TOKENS + 3):
        square(axes, 0.2 + 1.2 * token, 7.3, INK if token < TOKENS else None, f"$t_{token + 1}$", (1.0, 0.9))
    axes.text(6.3, 6.7, "later tokens: from step 3", fontsize=7.5, color=GREY)
    for head, x in enumerate(PLACES):
        axes.text(x + 0.6, 5.35, f"head {head + 1}", ha="center", fontsize=7.5, color=COLOURS[GROUPS[head]])
        attention(axes, x, 3.9, GROUPS[head])
    arrow(axes, (3.1, 7.1), (3.1, 5.9))
    formula = r"$x_h=\mathrm{softmax}(Q_hK_h^{\top}/\sqrt{D})$, 5 by 5, for every head $h$"
    captions(axes, formula, "causal: each token sees itself and those before it")


def draw_clusters(axes: Axes) -> None:
    """Draw the clusters, with the representative of each."""
    panel(axes, 2, "K-means, layer by layer", "k is known from the offline phase: here 3 of 6")
    for group, y in enumerate((7.4, 5.6, 3.8)):
        colour = COLOURS[group]
        axes.text(0.1, y + 0.28, f"cluster {group + 1}", fontsize=8, color=colour, fontweight="bold")
        for place, head in enumerate(MEMBERS[group]):
            x = 2.6 + 2.2 * place
            attention(axes, x, y, group)
            if head in REPRESENTATIVES:
                frame = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.6}
                axes.add_patch(Rectangle((x - 0.16, y - 0.16), 1.5, 1.5, **frame))
            axes.text(x + 0.98, y + 0.86, str(head + 1), fontsize=8, color=INK, ha="center")
    formula = "framed: the representative $r(c)$, nearest to the centroid"
    captions(axes, formula, "decided once, then fixed for the request", size=8.5)


def draw_scores(axes: Axes) -> None:
    """Draw the queries, keys and scores of representatives, which are all that there is from the sixth token on."""
    panel(axes, 3, "From the sixth token on", "queries, keys and scores of representatives only")
    for head, x in enumerate(PLACES):
        colour = COLOURS[GROUPS[head]] if head in REPRESENTATIVES else None
        for name, y in (("Q", 7.6), ("K", 6.4)):
            square(axes, x, y, colour, f"${name}_{head + 1}$")
        if colour:
            arrow(axes, (x + 0.6, 6.3), (x + 0.6, 5.2), colour)
            square(axes, x, 4.2, colour, f"$A_{head + 1}$")
    formula = r"$A_r=\mathrm{softmax}(Q_rK_r^{\top}/\sqrt{D})$ for the $k$ representatives"
    captions(axes, formula, "dashed: not projected, not scored, not stored")


def draw_values(axes: Axes) -> None:
    """Draw how members apply their representative's attention to their own values."""
    panel(axes, 4, "Members reuse the attention", "each head with its own values")
    for head, x in enumerate(PLACES):
        colour, representative = COLOURS[GROUPS[head]], REPRESENTATIVES[GROUPS[head]]
        if head == representative:
            square(axes, x, 7.6, colour, f"$A_{head + 1}$")
        arrow(axes, (PLACES[representative] + 0.6, 7.5), (x + 0.6, 5.85), colour)
        square(axes, x, 4.9, colour, f"$V_{head + 1}$")
        arrow(axes, (x + 0.6, 4.8), (x + 0.6, 4.25))
        axes.text(x + 0.6, 3.75, f"$y_{head + 1}$", ha="center", fontsize=9, color=INK)
    captions(
        axes, "$y_h=A_{r(c(h))}V_h$,   $c(h)$ the cluster of head $h$", "CHAI-QKV: $V_{r(c(h))}$ in place of $V_h$"
    )


def draw_cache(axes: Axes) -> None:
    """Draw the keys and values that stay in memory."""
    panel(axes, 5, "The cache", "keys of representatives, values of all")
    cell = (0.52, 0.42)
    for name, top in (("K", 8.3), ("V", 5.3)):
        axes.text(0.1, top - 1.1, name, fontsize=12, fontweight="bold", color=INK)
        for head in range(HEADS):
            y = top - 0.45 * head
            axes.text(1.35, y + 0.1, str(head + 1), fontsize=6.5, color=GREY, ha="right")
            for token in range(12):
                place, colour = 1.6 + 0.57 * token, COLOURS[GROUPS[head]]
                if name == "V" or head in REPRESENTATIVES:
                    axes.add_patch(Rectangle((place, y), *cell, facecolor=colour, edgecolor="none"))
                else:
                    square(axes, place, y, None, "", cell)
    axes.text(8.6, 7.2, "$k$ of $H$", fontsize=8, color=INK)
    axes.text(8.6, 4.2, "$H$ of $H$", fontsize=8, color=INK)
    axes.text(0.1, 1.6, r"$\frac{H+k}{2H}$ of the bytes: here 9 of 12", fontsize=9.5, color=INK)


def method() -> Figure:
    """Draw the diagram of the method: two panels above, three below."""
    figure = plt.figure(figsize=(11, 7.0), facecolor="#fbfbfb")
    corners = [(0.14, 0.53), (0.55, 0.53), *((0.02 + 0.33 * place, 0.015) for place in range(3))]
    panels = [figure.add_axes((*corner, 0.31, 0.455)) for corner in corners]
    for axes, draw in zip(panels, (draw_tokens, draw_clusters, draw_scores, draw_values, draw_cache), strict=True):
        draw(axes)
    return figure


# The README's overview: CHAI's three phases.

BRIGHT = ("#0072B2", "#E69F00", "#009E73")  # Okabe-Ito colours, distinct for colour-blind readers
SMALL: dict[str, Any] = {"ha": "center", "fontsize": 8, "color": "#444444"}
HEAD_PLACES = [0.6 + 1.55 * head for head in range(HEADS)]  # x of the heads in a panel


def phase(axes: Axes, title: str, subtitle: str) -> None:
    """Prepare the panel of a phase and write its heading."""
    axes.set(xlim=(0, 10), ylim=(0, 10))
    axes.axis("off")
    axes.text(5, 10.2, title, ha="center", va="bottom", fontsize=12, fontweight="bold")
    axes.text(5, 9.9, subtitle, ha="center", va="top", fontsize=9, color="#444444")


def box(axes: Axes, x: float, y: float, text: str, colour: str, *, filled: bool = True) -> None:
    """Draw a head's query, key or value; dashed if it is not computed."""
    face, edge, ink = (colour, colour, "white") if filled else ("white", "#bbbbbb", "#bbbbbb")
    style = "solid" if filled else "dashed"
    axes.add_patch(FancyBboxPatch((x, y), 0.9, 0.8, "round,pad=0.05", facecolor=face, edgecolor=edge, linestyle=style))
    axes.text(x + 0.45, y + 0.4, text, ha="center", va="center", color=ink, fontsize=9)


def draw_offline(axes: Axes) -> None:
    """Draw phase 1: clustering error against the number of clusters, with elbows."""
    phase(axes, "1  Offline, once per model", "how many clusters does a layer need?")
    inset = axes.inset_axes((0.12, 0.14, 0.8, 0.66))
    counts = list(range(1, 13))
    for colour, elbow, name in zip(BRIGHT, (8, 5, 3), ("early layer", "middle layer", "late layer"), strict=True):
        errors = [1 / (1 + (k / elbow) ** 4) for k in counts]
        inset.plot(counts, errors, color=colour, label=name)
        inset.plot(elbow + 2, errors[elbow + 1], "o", color=colour)
    inset.set(xlabel="clusters k", ylabel="clustering error (schematic)", xticks=range(2, 13, 2), yticks=[])
    inset.spines[["top", "right"]].set_visible(False)
    inset.legend(frameon=False, fontsize=8, loc="upper right")


def draw_online(axes: Axes) -> None:
    """Draw phase 2: clusters from five tokens."""
    phase(axes, "2  Online, once per request", "cluster the heads by their attention over the first five tokens")
    for head, (x, group) in enumerate(zip(HEAD_PLACES, GROUPS, strict=True)):
        axes.text(x + 0.5, 8.3, f"head {head + 1}", ha="center", fontsize=8, color=BRIGHT[group])
        for row in range(TOKENS):
            for column in range(row + 1):
                alpha = 0.95 if column == PATTERNS[group](row) else 0.18
                style = {"facecolor": BRIGHT[group], "alpha": alpha, "edgecolor": "none"}
                place = (x + 0.2 * column, 7.7 - 0.2 * row)
                axes.add_patch(FancyBboxPatch(place, 0.16, 0.16, "square,pad=0", **style))
    axes.text(5, 5.9, "K-means on the attention of each head, 5 by 5", ha="center", fontsize=9)
    for group, colour in enumerate(BRIGHT):
        left = 1.6 + 3.1 * group
        for place, head in enumerate(MEMBERS[group]):
            x, alpha = left + 0.75 * place, 1.0 if head in REPRESENTATIVES else 0.4
            axes.plot(x, 3.8, "o", markersize=17, color=colour, alpha=alpha)
            axes.text(x, 3.77, str(head + 1), ha="center", va="center", color="white", fontsize=9)
        end = (left + 0.375 * (len(MEMBERS[group]) - 1), 4.5)
        axes.add_patch(FancyArrowPatch((5, 5.6), end, arrowstyle="->", mutation_scale=10, color="#888888"))
    axes.text(5, 2.4, "full colour: the representative, nearest to the centroid", **SMALL)


def draw_clustered(axes: Axes) -> None:
    """Draw phase 3: one Q and K for each cluster, every V."""
    phase(axes, "3  From the sixth token on", "Q, K and scores of representatives only; every head keeps its V")
    for head, (x, group) in enumerate(zip(HEAD_PLACES, GROUPS, strict=True)):
        colour = BRIGHT[group]
        for name, y in (("Q", 7.4), ("K", 6.2), ("V", 2.9)):
            box(axes, x, y, f"{name}{head + 1}", colour, filled=name == "V" or head in REPRESENTATIVES)
        source, end = (HEAD_PLACES[REPRESENTATIVES[group]] + 0.45, 6.05), (x + 0.45, 3.9)
        axes.add_patch(FancyArrowPatch(source, end, arrowstyle="->", mutation_scale=9, color=colour))
    formula = r"$y_h = \mathrm{softmax}(Q_r K_r^\top)\, V_h$,   $r$ = representative of $h$'s cluster"
    axes.text(5, 1.9, formula, ha="center", fontsize=10)
    axes.text(5, 1.0, "dashed: not computed, not in the cache", **SMALL)


def overview() -> Figure:
    """Draw the overview: the three phases side by side."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6))
    for axes, draw in zip(panels, (draw_offline, draw_online, draw_clustered), strict=True):
        draw(axes)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.02, wspace=0.06)
    return figure


DIAGRAMS = {"method": (method, DOCS / "method.svg"), "overview": (overview, DOCS / "overview.png")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: write a diagram."""
    parser = argparse.ArgumentParser(prog="python -m analysis.diagrams", description="Draw a diagram of the method.")
    parser.add_argument("name", nargs="?", choices=list(DIAGRAMS), default="method", help="(method)")
    parser.add_argument("--out", type=Path, help="an .svg or .png file (in docs/)")
    options = parser.parse_args(arguments)
    draw, target = DIAGRAMS[options.name]
    out = options.out or target
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "chai"}):
        draw().savefig(out, dpi=130, metadata={"Date": None} if out.suffix == ".svg" else None)
    print(out)


if __name__ == "__main__":
    main()
