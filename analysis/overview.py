"""The README's picture of CHAI's three phases: ``python -m analysis.overview`` writes docs/overview.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).resolve().parent.parent / "docs" / "overview.png"
COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Okabe-Ito: told apart with colour-blind eyes
GROUPS = (0, 0, 1, 0, 2, 1)
REPRESENTATIVES = (1, 2, 4)


def panel(axes: Axes, title: str, subtitle: str) -> None:
    """An empty panel with its two lines of heading."""
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    axes.axis("off")
    axes.text(5, 10.2, title, ha="center", va="bottom", fontsize=12, fontweight="bold")
    axes.text(5, 9.9, subtitle, ha="center", va="top", fontsize=9, color="#444444")


def box(axes: Axes, x: float, y: float, text: str, colour: str, *, filled: bool = True) -> None:
    """A head's query, key or value."""
    face, edge, ink = (colour, colour, "white") if filled else ("white", "#bbbbbb", "#bbbbbb")
    style = "solid" if filled else "dashed"
    axes.add_patch(FancyBboxPatch((x, y), 0.9, 0.8, "round,pad=0.05", facecolor=face, edgecolor=edge, linestyle=style))
    axes.text(x + 0.45, y + 0.4, text, ha="center", va="center", color=ink, fontsize=9)


def offline(axes: Axes) -> None:
    """Phase 1: the elbow."""
    panel(axes, "1  Offline, once a model", "how many clusters does a layer need?")
    inset = axes.inset_axes((0.12, 0.14, 0.8, 0.66))
    counts = list(range(1, 13))
    for colour, elbow, name in zip(COLOURS, (8, 5, 3), ("early layer", "middle layer", "late layer"), strict=True):
        errors = [1 / (1 + (k / elbow) ** 4) for k in counts]
        inset.plot(counts, errors, color=colour, label=name)
        inset.plot(elbow + 2, errors[elbow + 1], "o", color=colour)
    inset.set_xlabel("clusters k")
    inset.set_ylabel("clustering error (schematic)")
    inset.set_xticks([2, 4, 6, 8, 10, 12])
    inset.set_yticks([])
    inset.spines[["top", "right"]].set_visible(False)
    inset.legend(frameon=False, fontsize=8, loc="upper right")


def online(axes: Axes) -> None:
    """Phase 2: membership from five tokens."""
    panel(axes, "2  Online, once a request", "which heads belong together? the first five tokens tell")
    for head, group in enumerate(GROUPS):
        x = 0.6 + 1.55 * head
        axes.text(x + 0.5, 8.3, f"head {head + 1}", ha="center", fontsize=8, color=COLOURS[group])
        for row in range(5):
            for column in range(row + 1):
                near = {0: column == 0, 1: column == row, 2: column == max(0, row - 1)}[group]
                axes.add_patch(
                    FancyBboxPatch(
                        (x + 0.2 * column, 7.7 - 0.2 * row), 0.16, 0.16, "square,pad=0",
                        facecolor=COLOURS[group], alpha=0.95 if near else 0.18, edgecolor="none",
                    )
                )  # fmt: skip
    axes.text(5, 5.9, "K-means on the attention of each head, 5 by 5", ha="center", fontsize=9)
    for group in range(3):
        members = [head for head in range(6) if GROUPS[head] == group]
        x = 1.6 + 3.1 * group
        for place, head in enumerate(members):
            chosen = head in REPRESENTATIVES
            axes.plot(x + 0.75 * place, 3.8, "o", markersize=17, color=COLOURS[group], alpha=1.0 if chosen else 0.4)
            axes.text(x + 0.75 * place, 3.77, str(head + 1), ha="center", va="center", color="white", fontsize=9)
        axes.add_patch(
            FancyArrowPatch(
                (5, 5.6), (x + 0.375 * (len(members) - 1), 4.5), arrowstyle="->", mutation_scale=10, color="#888888"
            )
        )
    axes.text(
        5, 2.4, "full colour: the representative, nearest its cluster's mean", ha="center", fontsize=8, color="#444444"
    )


def clustered(axes: Axes) -> None:
    """Phase 3: one Q and K a cluster, every V."""
    panel(axes, "3  From the sixth token on", "Q, K and scores of representatives only; every head keeps its V")
    for head, group in enumerate(GROUPS):
        x, kept = 0.6 + 1.55 * head, head in REPRESENTATIVES
        box(axes, x, 7.4, f"Q{head + 1}", COLOURS[group], filled=kept)
        box(axes, x, 6.2, f"K{head + 1}", COLOURS[group], filled=kept)
        box(axes, x, 2.9, f"V{head + 1}", COLOURS[group])
        source = 0.6 + 1.55 * REPRESENTATIVES[group] + 0.45
        axes.add_patch(
            FancyArrowPatch((source, 6.05), (x + 0.45, 3.9), arrowstyle="->", mutation_scale=9, color=COLOURS[group])
        )
    axes.text(
        5,
        1.9,
        "$y_h = \\mathrm{softmax}(Q_r K_r^\\top)\\, V_h$,   $r$ = representative of $h$'s cluster",
        ha="center",
        fontsize=10,
    )
    axes.text(5, 1.0, "dashed: not computed, not in the cache", ha="center", fontsize=8, color="#444444")


def main() -> None:
    """Draw all three."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6))
    for axes, draw in zip(panels, (offline, online, clustered), strict=True):
        draw(axes)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.02, wspace=0.06)
    figure.savefig(TARGET, dpi=130)
    print(TARGET)


if __name__ == "__main__":
    main()
