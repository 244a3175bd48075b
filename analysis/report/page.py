"""Write the report as a page that needs no other file, and as Markdown."""

from __future__ import annotations

import base64
import gzip
import os
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.plotting.style import TIMES, label
from analysis.report import provenance
from analysis.report.claims import CLAIM_VERDICTS, Judged
from analysis.report.conditions import HALF
from analysis.report.content import Content
from analysis.report.figures import uri
from analysis.report.tables import cell_ends, cell_title, cell_words, uncounted, verdict_counts
from analysis.stats import RULES, VERDICTS, Interval
from analysis.tables.formats import comma_separated
from analysis.tables.layout import commands, notes, paper_text
from analysis.tables.settings import COUNTS, PROFILE
from analysis.tables.specs import task_name

#: A sign for each verdict, distinct without colour.
SIGNS = {
    "reproduced": "✓", "not reproduced": "✗", "undecided": "≈", "not run yet": "○",
    "not implemented": "∅", "holds": "✓", "fails": "✗",
}  # fmt: skip
MINUS = "\N{MINUS SIGN}"
#: Which runs count for a claim, and what the board says without a number.
COUNTED = (
    "A run counts only if it is of the paper's model in every field of its architecture (as loaded), has 16-bit "
    f"numbers ({' or '.join(HALF)}), the same on both sides of a comparison, and CHAI's default settings with the "
    "counts of the model's configuration or of a head profile, the same for accuracy, memory and time. Accuracy counts "
    "with trained weights on the whole data set, times on a GPU. Runs that were found and do not count are named with "
    "the reason.",
    "Accuracy on one task has an exact paired interval (Clopper and Pearson), a mean one from score intervals.",
    "Not implemented means that this project lacks the means to reach the paper's number, so that ours is no evidence "
    "against it. A number that cannot decide a claim, such as one of a profile without redundant heads, is undecided.",
)
BOUNDS = {"equals": "", "at most": "≤ ", "at least": "≥ ", "reaches": "up to "}
DIGITS = {
    "x": 2,
    "correlation": 2,
    "GB": 2,
    "tokens": 0,
    "heads": 0,
    "pairs": 0,
    "numbers": 0,
}  # decimals of numbers by unit, else 1
LEFT, RIGHT = 7.0, 143.0  # pixels, ends of the axis of a claim's picture
UNITS = {"x": TIMES, "correlation": ""}  # how units are printed, else after a space


def write(content: Content, out: Path) -> Path:
    """Write ``index.html`` and ``report.md``, each completely or not at all; return the page's path.

    Raises:
        OSError: the folder cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment, scripts = _environment(), _scripts(content)
    for template, name in (("report.md.j2", "report.md"), ("index.html.j2", "index.html")):
        text = environment.get_template(template).render(content=content, scripts=scripts)
        part = out / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, out / name)
    return out / "index.html"


def _environment() -> Environment:
    loader = PackageLoader("analysis.report")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    )  # fmt: skip
    environment.filters |= {function.__name__: function for function in FILTERS} | {
        "cell": lambda text: text.replace("|", r"\|").replace("\n", " "),
        "columns": lambda table: list(map(task_name, table.spec.columns)),
        "csv": lambda table: uri("text/csv", comma_separated(table).encode()),
    }
    environment.globals |= {
        "SIGNS": SIGNS, "VERDICTS": VERDICTS, "CLAIM_VERDICTS": CLAIM_VERDICTS, "RULES": (*RULES, *COUNTED),
        "COUNTS": COUNTS, "PROFILE": PROFILE, "provenance": provenance, "paper_text": paper_text,
        # Styles and scripts are included as they are.
        "raw": lambda name: Markup(loader.get_source(environment, name)[0]),
    }  # fmt: skip
    return environment


def _scripts(content: Content) -> Markup:
    """Return plotly's script, compressed to a third; empty if there are no plots."""
    if not any(part.tradeoff or part.layers for part in (content.paper, content.embedded)):
        return Markup("")
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    return Markup(f'<script type="application/gzip" id="plotly">{packed}</script>')


def minus(text: str) -> str:
    """Replace hyphens before numbers by minus signs."""
    return re.sub(r"(?<![\w.])-(?=\d)", MINUS, text)


def number(value: float, digits: int = 1) -> str:
    """Format with a number of decimals, separators of thousands, and a real minus sign."""
    return f"{value:,.{digits}f}".replace("-", MINUS)


def ends(interval: Interval, digits: int = 1) -> str:
    """Format the ends of an interval; empty if it has no width."""
    if interval.low == interval.high:
        return ""
    return f"[{number(interval.low, digits)}, {number(interval.high, digits)}]"


def paper(judged: Judged) -> str:
    """Format the paper's number with its bound and unit."""
    return f"{BOUNDS[judged.claim.bound]}{judged.claim.value}{_unit(judged.claim.unit)}"


def ours(judged: Judged) -> str:
    """Format our number with its unit."""
    if judged.number is None:
        return "no run that counts" if judged.passed else "not run yet"
    unit = judged.claim.unit
    return number(judged.number.interval.value, DIGITS.get(unit, 1)) + _unit(unit)


def our_ends(judged: Judged) -> str:
    """Format the interval of our number, which must be measured."""
    assert judged.ours is not None
    return ends(judged.ours.interval, DIGITS.get(judged.claim.unit, 1))


def strip_places(judged: Judged) -> dict[str, float]:
    """Return x, in pixels, of the parts of a claim's picture: what agrees with it, the paper's number, and ours."""
    assert judged.ours is not None
    claim, ours = judged.claim, judged.ours.interval
    paper, slack = float(claim.value), float(claim.tolerance)
    points = [paper - slack, paper + slack, ours.low, ours.high, ours.value]
    low, high = min(points), max(points)
    room = (high - low) * 0.12 or abs(paper) * 0.1 or 1.0
    low, high = low - room, high + room

    def x(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 1)

    # A limit agrees with everything on one side of it.
    left = LEFT if claim.bound == "at most" else x(paper - slack)
    right = RIGHT if claim.bound in ("at least", "reaches") else x(paper + slack)
    places = {"paper": x(paper), "low": x(ours.low), "high": x(ours.high), "ours": x(ours.value)}
    return places | {"left": left, "width": max(right - left, 2)}


def _unit(unit: str) -> str:
    return UNITS.get(unit, f"\N{NO-BREAK SPACE}{unit}")


def duration(seconds: float) -> str:
    """Format in hours, minutes or seconds."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


FILTERS = (
    label, minus, duration, number, ends, paper, ours, our_ends, strip_places, notes, commands,
    verdict_counts, uncounted, cell_words, cell_ends, cell_title,
)  # fmt: skip
