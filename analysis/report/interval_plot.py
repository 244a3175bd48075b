"""Draw a claim as a small picture: the values that agree with it, the paper's number, and ours with its interval."""

from __future__ import annotations

from analysis.report.claims import Judged

WIDTH, HEIGHT, MARGIN = 150.0, 22.0, 7.0  # pixels


def interval_plot(judged: Judged) -> str:
    """Return SVG; empty without a number of ours."""
    if judged.ours is None:
        return ""
    claim, ours = judged.claim, judged.ours.interval
    paper, slack = float(claim.value), float(claim.tolerance)
    points = [paper - slack, paper + slack, ours.low, ours.high, ours.value]
    low, high = min(points), max(points)
    room = (high - low) * 0.12 or abs(paper) * 0.1 or 1.0
    low, high = low - room, high + room

    def x(value: float) -> float:
        return round(MARGIN + (WIDTH - 2 * MARGIN) * (value - low) / (high - low), 1)

    # A limit agrees with everything on one side of it.
    left = MARGIN if claim.bound == "at most" else x(paper - slack)
    right = WIDTH - MARGIN if claim.bound in ("at least", "reaches") else x(paper + slack)
    middle = HEIGHT / 2
    words = f"ours {ours.value:.4g}, from {ours.low:.4g} to {ours.high:.4g}; the paper's {claim.value}"
    return (
        f'<svg class="strip" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" width="{WIDTH:g}" height="{HEIGHT:g}" role="img" '
        f'aria-label="{words}"><title>{words}</title>'
        f'<line class="axis" x1="{MARGIN:g}" x2="{WIDTH - MARGIN:g}" y1="{middle:g}" y2="{middle:g}"/>'
        f'<rect class="agrees" x="{left:g}" width="{max(right - left, 2):.1f}" y="{middle - 5:g}" height="10" rx="2"/>'
        f'<line class="paper" x1="{x(paper):g}" x2="{x(paper):g}" y1="{middle - 8:g}" y2="{middle + 8:g}"/>'
        f'<line class="whisker" x1="{x(ours.low):g}" x2="{x(ours.high):g}" y1="{middle:g}" y2="{middle:g}"/>'
        f'<circle class="ours" cx="{x(ours.value):g}" cy="{middle:g}" r="4"/></svg>'
    )
