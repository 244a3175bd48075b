"""The report as files: a page that needs nothing but itself, and Markdown."""

from __future__ import annotations

import base64
import gzip
import os
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.figures import _look
from analysis.report import _provenance
from analysis.report._claims import Judged
from analysis.report._content import Content, Part
from analysis.report._strip import strip
from analysis.report._verdict import RULES, VERDICTS, Interval
from analysis.tables._settings import COUNTS, PROFILE

#: Of each verdict: a sign that tells it without colour.
SIGNS = {
    "reproduced": "✓", "not reproduced": "✗", "undecided": "≈", "not run yet": "○",
    "holds": "✓", "fails": "✗",
}  # fmt: skip
MINUS = "\N{MINUS SIGN}"
BOUNDS = {"equals": "", "at most": "≤ ", "at least": "≥ ", "reaches": "up to "}


def write(content: Content, out: Path) -> Path:
    """Write ``index.html`` and ``report.md``, each whole or not at all; returns the page's path.

    Raises:
        OSError: the folder can't be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment = _environment(content)
    shared = {"content": content, "parts": (content.paper, content.embedded)}
    page = environment.get_template("index.html.j2").render(**shared, scripts=_scripts(content))
    _replace(out / "report.md", environment.get_template("report.md.j2").render(**shared))
    _replace(out / "index.html", page)
    return out / "index.html"


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _environment(content: Content) -> Environment:
    environment = Environment(
        loader=PackageLoader("analysis.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    )  # fmt: skip
    environment.filters |= {
        "label": _look.label, "minus": minus, "duration": duration,
        "number": number, "bytes": size, "ends": ends, "paper": paper, "ours": ours,
        "our_ends": lambda one: ends(one.ours.interval, _digits(one.claim.unit)),
        "cell": lambda text: text.replace("|", r"\|").replace("\n", " "),
    }  # fmt: skip
    environment.globals |= {
        "SIGNS": SIGNS, "VERDICTS": VERDICTS, "RULES": RULES, "COUNTS": COUNTS, "PROFILE": PROFILE,
        "provenance": _provenance, "strip": lambda one: Markup(strip(one)), "raw": _raw(environment),
        "command_uses": command_uses,
    }  # fmt: skip
    return environment


def _raw(environment: Environment) -> Any:
    """A function that reads a style or script into the page as it is."""

    def read(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])

    return read


def _scripts(content: Content) -> Markup:
    """The script of plotly, compressed to a third, where there is something for it to draw; else nothing."""
    if not any(part.tradeoff or part.layers for part in (content.paper, content.embedded)):
        return Markup("")
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    return Markup(f'<script type="application/gzip" id="plotly">{packed}</script>')


def minus(text: str) -> str:
    """Minus signs for hyphens before numbers."""
    return re.sub(r"(?<![\w.])-(?=\d)", MINUS, text)


def number(value: float, digits: int = 1) -> str:
    """With its digits, thousands apart, a real minus sign."""
    return f"{value:,.{digits}f}".replace("-", MINUS)


def _digits(unit: str) -> int:
    return {"x": 2, "correlation": 2, "GB": 2, "tokens": 0}.get(unit, 1)


def ends(interval: Interval, digits: int = 1) -> str:
    """The ends of an interval; empty where it has no width."""
    if interval.low == interval.high:
        return ""
    return f"[{number(interval.low, digits)}, {number(interval.high, digits)}]"


def paper(judged: Judged) -> str:
    """The paper's number, as it means it, with its unit."""
    claim = judged.claim
    return f"{BOUNDS[claim.bound]}{claim.value}{_unit(claim.unit)}"


def ours(judged: Judged) -> str:
    """Our number with its unit."""
    if judged.ours is None:
        return "not run yet"
    return number(judged.ours.interval.value, _digits(judged.claim.unit)) + _unit(judged.claim.unit)


def _unit(unit: str) -> str:
    return {"x": _look.TIMES, "correlation": ""}.get(unit, f"\N{NO-BREAK SPACE}{unit}")


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, as people say it."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes in the unit that keeps them short; powers of ten."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} B"


def command_uses(part: Part, placeholder: str) -> bool:
    """Whether any command of a part's tables has a placeholder."""
    return any(placeholder in line for sheet in part.tables for _, line in sheet.commands)
